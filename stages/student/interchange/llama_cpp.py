"""A language model and its tokenizer as one GGUF file, which llama.cpp runs.

What llama.cpp cannot express is refused by name. Its own converter assumes an inner width of twice
the model's, so the file is written here, with the model's own sizes.

Sources: llama.cpp's `src/models/mamba-base.cpp` (the graph), `src/models/mamba.cpp` (which sizes it
loads) and `src/llama-vocab.cpp` (what it makes of a text); names of tensors are `gguf`'s table.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.commit import explained, write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.interchange.weights import refuse_students
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.tokens.frame import surroundings

logger = logging.getLogger(__name__)

CONTEXT_LENGTH = 2**20  # what llama.cpp's users get who name none; a Mamba has no limit
ONLY_EXPAND = 2  # of a Mamba-1: llama.cpp loads no other

# Types of tokens, by llama.cpp's numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SPACE = "▁"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_MARKED_REST = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# llama.cpp's name of how a byte-level tokenizer cuts a text, by its patterns, in their order, and
# whether a piece that is a token stays whole (`ignore_merges`). Those of GPT-4o and Tekken are not
# here: llama.cpp knows capitals from A to Z alone, and cuts the É off ÉCOLE.
SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((rf"{_WORDS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), False): "smaug-bpe",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_MARKED}|\p{{N}}|{_MARKED_REST}",), False): "qwen35",
    ((_CL100K,), False): "smaug-bpe",
    (_DEEPSEEK, False): "deepseek-v3",
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer as llama.cpp reads one.

    Attributes:
        model: its kind of tokenizer: `gpt2` is a byte-level BPE, `llama` SentencePiece's BPE,
            `none` ids without text.
        pre: of a byte-level BPE: llama.cpp's name of how it cuts a text.
        tokens: by id, a name for each row of the embedding.
        types: of each.
        merges: of a byte-level BPE, in their order.
        scores: of SentencePiece's BPE: the highest is merged first.
        adds_space: whether a text gets a space before it.
        ids: of special tokens by their roles: `bos`, `eos`, `unk`, `pad`.
        begins: whether a text begins with `bos`.
    """

    model: str
    pre: str = "default"
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    adds_space: bool = False
    ids: Mapping[str, int]
    begins: bool


def write_gguf(
    model: PreTrainedModel, tokenizer: Tokenizer | None, out: Path, *, source: str
) -> None:
    """Write a student as a GGUF file, in float32.

    Args:
        model: a Mamba language model.
        tokenizer: its own; none for a file that takes and gives ids only.
        out: the file.
        source: what is written, as a sentence begins.

    Raises:
        UserError: if `gguf` is not installed, llama.cpp cannot express the model or read its
            tokenizer, or the file system refuses.
    """
    if not isinstance(model, MambaStudentForCausalLM):
        raise UserError(
            f"llama.cpp runs Mamba language models, and {source} is a {type(model).__name__}: "
            "train one with --arch mamba2 from a cache of --task lm"
        )
    config = model.config
    _refuse(config, source=source)
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, config.vocab_size)
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            f"a GGUF file needs the package gguf ({error}): install it with `pip install -c "
            'constraints.txt -e ".[gguf]"`'
        ) from error
    arch = gguf.MODEL_ARCH.MAMBA if config.arch == "mamba" else gguf.MODEL_ARCH.MAMBA2
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    with explained(out), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.gguf"
        # Without a name: llama.cpp takes some (phi-3, modern-bert) for a family's.
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
        _write_sizes(writer, config)
        _write_vocabulary(writer, vocabulary, config.vocab_size)
        for name, tensor in _tensors(model):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(known, tensor.detach().float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_bytes_atomically(out, file.read_bytes())


def _refuse(config: MambaStudentConfig, *, source: str) -> None:
    refuse_students(config, target="llama.cpp")
    if config.arch == "mamba" and config.expand != ONLY_EXPAND:
        raise UserError(
            f"{source} is a Mamba-1 with an inner width of {config.expand} times the model's, and "
            f"llama.cpp loads {ONLY_EXPAND} only: train one with --expand {ONLY_EXPAND}, or a "
            "Mamba-2 (--arch mamba2), of any"
        )


def _write_sizes(writer: Any, config: MambaStudentConfig) -> None:
    writer.add_file_type(0)  # all in float32
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)  # it asks for these, and uses neither
    writer.add_head_count(0)
    writer.add_block_count(config.num_layers)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    if config.arch == "mamba":
        writer.add_ssm_time_step_rank(config.resolved_dt_rank)
    else:  # a Mamba-2's rank is its number of heads
        writer.add_ssm_time_step_rank(config.d_inner // config.head_dim)
        writer.add_ssm_group_count(config.ngroups)


def _tensors(model: MambaStudentForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each parameter under its mamba_ssm name, in llama.cpp's form; a tied head is left out."""
    for name, tensor in model.named_parameters():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind == "A_log":
            tensor = -torch.exp(tensor)
        if kind == "conv1d":
            tensor = tensor.squeeze(1)
        if model.config.arch == "mamba2":
            if kind in ("A_log", "D"):
                tensor = tensor[:, None]
            if name.endswith("mixer.norm.weight"):
                tensor = tensor.view(model.config.ngroups, -1)
            name = name.replace("mixer.dt_bias", "mixer.dt_proj.bias")
        yield name, tensor


def _write_vocabulary(writer: Any, vocabulary: Vocabulary | None, num_rows: int) -> None:
    writer.add_vocab_size(num_rows)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(False)  # a prompt is gone on with
    for role, token_id in vocabulary.ids.items():
        getattr(writer, f"add_{role}_token_id")(token_id)


def vocabulary_of(tokenizer: Tokenizer, num_rows: int) -> Vocabulary:
    """A tokenizer as llama.cpp reads one.

    Args:
        tokenizer: of the kinds that llama.cpp has: a BPE over bytes or SentencePiece's.
        num_rows: of the embedding; rows without a token get one that no text becomes.

    Raises:
        UserError: naming what llama.cpp reads otherwise, or not at all.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unreadable(tokenizer, "is written in Python alone")
    highest = max(tokenizer.get_vocab().values())
    if highest >= num_rows:
        raise UserError(
            f"{type(tokenizer).__name__} has ids up to {highest:,}, and the student {num_rows:,} "
            "rows: give the tokenizer that it was trained with"
        )
    settings = json.loads(backend.to_str())
    if settings["model"]["type"] != "BPE":
        raise _unreadable(tokenizer, f"is a {settings['model']['type']}")
    around = surroundings(tokenizer)
    if len(around.before) > 1:
        raise _unreadable(tokenizer, f"puts {len(around.before)} tokens before a text, not one")
    if around.end_id is None:
        raise UserError(
            f"{type(tokenizer).__name__} names no end of text (eos_token), and llama.cpp would "
            "end at some other token in its place: set one in the run's tokenizer_config.json, or "
            "write ids alone with --ids-only"
        )
    ids = {"eos": around.end_id}
    for role, token_id in (
        ("bos", around.before[0] if around.before else tokenizer.bos_token_id),
        ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
    ):
        if token_id is not None:
            ids[role] = token_id
    is_over_bytes = "ByteLevel" in [part["type"] for part in _parts(settings, "pre_tokenizer")]
    read = _byte_level if is_over_bytes else _sentencepiece
    own = read(tokenizer, settings)
    tokens, types = _listed(settings, num_rows, tokenizer.unk_token, of_bytes=is_over_bytes)
    if own.get("scores"):
        own["scores"] = [own["scores"].get(token, _NEVER) for token in tokens]
    return Vocabulary(tokens=tokens, types=types, ids=ids, begins=bool(around.before), **own)


_NEVER = -1e6  # the score of what no merge makes
_KEEPS_ALL = (("Isolated", False), ("Removed", True))  # how a Split treats what it finds, or not


def _unreadable(tokenizer: Tokenizer, why: str) -> UserError:
    return UserError(
        f"llama.cpp cannot read text as this {type(tokenizer).__name__} does, which {why}: train a "
        "student of a teacher with a BPE over bytes (GPT-2, Qwen, Llama 3) or SentencePiece's "
        "(Llama 2), or write ids alone with --ids-only"
    )


def _parts(settings: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, sequences taken apart."""
    step = settings[field]
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    if inner is None:
        return [step]
    return [part for one in inner for part in _parts({field: one}, field)]


def _byte_level(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is a byte-level BPE's own."""
    model = settings["model"]
    patterns, adds_space = [], False
    for part in _parts(settings, "pre_tokenizer"):
        if part["type"] == "ByteLevel":
            patterns += [_GPT2] if part["use_regex"] else []
            adds_space |= part["add_prefix_space"]
        elif part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(r"\p{N}")
        elif part["type"] == "Split" and (part["behavior"], part["invert"]) in _KEEPS_ALL:
            pattern = part["pattern"].get("Regex", "")
            patterns.append(pattern.replace("\r", r"\r").replace("\n", r"\n"))
        else:
            patterns.append(part["type"])
    pre = SPLITS.get((tuple(patterns), bool(model.get("ignore_merges"))))
    if pre is None:
        raise _unreadable(tokenizer, f"cuts it by {patterns}")
    if adds_space:
        raise _unreadable(tokenizer, "puts a space before it")
    normalizers = [part["type"] for part in _parts(settings, "normalizer")]
    if normalizers == ["NFC"]:
        logger.warning("llama.cpp composes no accents (NFC), as the tokenizer does before it reads")
    elif normalizers:
        raise _unreadable(tokenizer, f"normalises it by {' and '.join(normalizers)}")
    return {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in _merges(model)]}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs that are merged, the first first; older files have them as one string."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _sentencepiece(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is its own of a BPE over text in which `▁` stands for a space."""
    model, vocabulary = settings["model"], settings["model"]["vocab"]
    if not model["byte_fallback"] or any(f"<0x{one:02X}>" not in vocabulary for one in range(256)):
        raise _unreadable(tokenizer, "has no token for each single byte")
    adds_space = False
    for part in _parts(settings, "normalizer"):
        if part == {"type": "Prepend", "prepend": _SPACE}:
            adds_space = True
        elif part != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            raise _unreadable(tokenizer, f"normalises it by {part['type']}")
    for part in _parts(settings, "pre_tokenizer"):
        if part["type"] == "Metaspace" and not part["split"]:
            adds_space = part["prepend_scheme"] != "never"
            if adds_space:
                logger.warning(
                    "llama.cpp puts a space before a text that begins with one, too, and behind "
                    "each special token; the tokenizer need not"
                )
        # The normaliser has left no space to split at.
        elif part["type"] != "Split" or part["pattern"] != {"String": " "}:
            raise _unreadable(tokenizer, f"cuts it by {part['type']}")
    return {"model": "llama", "scores": _scores(tokenizer, settings), "adds_space": adds_space}


def _scores(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, float]:
    """What llama.cpp merges by: a token's score, the highest first, whatever its two halves are.

    Raises:
        UserError: if the order of the merges, which are of halves, is no order of tokens.
    """
    merges = _merges(settings["model"])
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    pairs = set(merges)
    made = {one for one in settings["model"]["vocab"] if len(one) == 1 or one in ranks}
    # Added tokens are found in the text before anything is merged.
    for token in ranks.keys() - {one["content"] for one in settings["added_tokens"]}:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = ranks[token]
        if found[-1] - found[0] >= len(found) or any(
            {*pair} <= made and pair not in pairs for pair in halves
        ):
            raise _unreadable(tokenizer, f"makes {token!r} of some halves sooner than of others")
    return {token: -float(found[0]) for token, found in ranks.items()}


def _listed(
    settings: Mapping[str, Any], num_rows: int, unknown: Any, *, of_bytes: bool
) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id."""
    tokens = [f"[unused row {token_id}]" for token_id in range(num_rows)]
    types = [UNUSED] * num_rows
    for token, token_id in settings["model"]["vocab"].items():
        is_byte = not of_bytes and len(token) == 6 and token.startswith("<0x")
        tokens[token_id], types[token_id] = token, BYTE if is_byte else NORMAL
    for one in settings["added_tokens"]:
        token_id, content = one["id"], one["content"]
        if not one["special"] and not of_bytes:  # matched in the text before its spaces are
            content = content.replace(_SPACE, " ")
        tokens[token_id] = content
        types[token_id] = CONTROL if one["special"] else USER_DEFINED
        if one["content"] == unknown and not of_bytes:
            types[token_id] = UNKNOWN
    return tokens, types
