"""Every text architecture of the installed transformers through stage one.

    python -m benchmarks.teachers                 # all of them, into docs/teachers.md
    python -m benchmarks.teachers --only gpt2 fnet

A tiny, randomly initialised model of each class is saved, cached by stage one and read again; each
cached value is compared with `from_pretrained` and a plain forward pass of that document alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from teacher_cache.cache.codecs.attention import attention_from, row_kl
from teacher_cache.cache.errors import TeacherCacheError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.codecs.named import open_codec
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.models.pretrained import EAGER, base_of
from teacher_cache.stages.tasks import TaskName

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "teachers.md"
VOCAB_SIZE = 120
WORDS = [f"w{i}" for i in range(VOCAB_SIZE - 5)]
# Of whose vocabularies transformers makes a tokenizer of bytes: their words are letters.
OF_BYTES = ["qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"]
LENGTHS = (30, 3, 12, 30, 7, 3, 18, 41)  # words of the documents
MAX_LENGTH = 48
SECONDS = 60  # of processor time for a row
CLASS_LOGIT = 1e-3
LOG_PROB = 0.02  # nats, beyond what the formats round
HALF = 2.0**-9  # of a log-prob
LIKELY = -8.0  # nats; below, a codec may store coarsely
MAP_KL = 2e-3  # nats, of a row
STATE = 4e-3  # of a state's length
# No text language models, or not without a library that is not here.
LEFT_OUT = {
    "lm": "dots3_note emu3 fuyu gemma3n gemma4_assistant gemma4_unified_assistant git got_ocr2 "
    "mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal trocr whisper",
    "classification": "layoutlmv2",
}
# Names that configurations have for one thing, and what makes a model small. Two query heads for
# each key head, and windows that are shorter than the documents.
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32,
    "emb_dim": 32, "embedding_size": 32, "n_embed": 32, "model_dim": 32, "decoder_hidden_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_blocks": 2, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 64, "d_ff": 64, "ffn_dim": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "n_inner": 64, "d_inner": 64, "ffn_hidden_size": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "sliding_window": 8,
    "local_attention": 8, "attention_chunk_size": 8, "max_position_embeddings": 128,
    "n_positions": 128, "max_seq_len": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "initializer_range": 0.2, "num_labels": 3, "dropout": 0.0,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "time_step_rank": 4, "conv_kernel": 4,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_chunk_size": 8,
    "chunk_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "axial_pos_embds": False,
    "attention_window": 8, "num_hash_buckets": 64, "type_vocab_size": 2,
}  # fmt: skip

FEW = (
    "vocab_size num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_decoder_layers pad_token_id bos_token_id eos_token_id decoder_start_token_id "
    "initializer_range num_experts num_local_experts n_routed_experts num_experts_per_tok"
)
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "xlnet": {"d_head": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "deberta": {"pooler_hidden_size": 32},
    "deberta-v2": {"pooler_hidden_size": 32},
}
# Types whose configuration computes values from others, or names them otherwise, are constructed
# with the small values that they have and with these. A dictionary is of a configuration within.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_DELTA = {
    "num_expert_group": 1, "num_experts_per_token": 2, "num_shared_experts": 1,
    "linear_head_dim": 8, "linear_num_heads": 4, "model_max_length": 128, "num_key_value_heads": 4,
}  # fmt: skip
_GEMMA4 = {
    "per_layer_config": {}, "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_experts": None, "moe_intermediate_size": None,
}  # fmt: skip
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 8, "ple_embed_dim": 32,
    "ngram_vocab_size_base": 100, "split_ngram_parts": 4, "indexer_n_heads": 4,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
CONSTRUCTED: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {**_DELTA, "layer_group_size": 2},
    "blt": {
        "vocab_size": 260, "encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 64,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260, "hidden_size_global": 32},
        "decoder_config": {"vocab_size": 260, "hidden_size_global": 32},
    },
    "codegen": {"n_ctx": 128, "rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4},
    "dots1": {"layer_types": ["full_attention", "sliding_attention"]},
    "dots3_note_text": {
        "per_layer_config": {}, "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"], "index_topk": 16, "index_head_dim": 8,
        "index_n_heads": 32, "head_dim": 16, "shared_experts_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
    "esm": {"mask_token_id": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0], "laurel_rank": 8,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_conv": 4, "mamba_dt_rank": 4,
    },
    "kimi_linear": {
        **_DELTA, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"], "q_lora_rank": None,
    },
    "laguna": {
        "num_attention_heads_per_layer": [4, 4], "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "moe_topk": 2, "expert_ffn_hidden_size": 16, "zero_expert_num": 2,
        "num_key_value_heads": 4,
    },
    "ministral": {},
    "nemotron": {},
    "nemotron_h": {
        "n_groups": 1, "moe_shared_expert_intermediate_size": 16, "sliding_window": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "perceiver": {
        "num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
    },
    "qwen3_5": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {"depth": 1, "out_hidden_size": 32},
    },
    "qwen3_5_moe": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {"depth": 1, "out_hidden_size": 32},
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "t5gemma": {},
    "t5gemma2": {},
    "xlstm": {"embedding_dim": 32, "ffn_round_up_to_multiple_of": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4,
        "num_key_value_heads": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "mamba_ngroups": 1, "kv_channels": 8,
        "num_query_groups": 4, "num_key_value_heads": 4, "n_mamba_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"router_hidden_size": 16, "num_experts_per_tok": 1, "sliding_window": None},
}  # fmt: skip


@dataclass
class Found:
    """Of one architecture.

    Attributes:
        name: its type in transformers.
        rows: how documents share a pass; None where it does not run.
        said: of each thing that can be cached, exact, refused and why, or what is wrong.
        faults: tracebacks and wrong values.
    """

    name: str
    rows: str | None = None
    said: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def main() -> None:
    """Run what is asked for and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="types of transformers")
    parser.add_argument("--json", type=Path, help="rows as found; those there are not run again")
    given = parser.parse_args()
    quiet()
    known = rows_of(given.json)
    tables = {}
    for task, names in NAMES.items():
        chosen = [
            name
            for name in sorted(names)
            if name not in LEFT_OUT[task].split() and (given.only is None or name in given.only)
        ]
        found = (known.get((task, name)) or tried(task, name, given.json) for name in chosen)
        tables[task] = [one for one in found if one is not None]
    text = page(tables)
    if given.only is None:
        TABLE.write_text(text)
    print(text)
    raise SystemExit(any(one.faults for rows in tables.values() for one in rows))


def rows_of(log: Path | None) -> dict[tuple[str, str], Found]:
    """What an earlier run wrote."""
    if log is None or not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {(row.pop("task"), row["name"]): Found(**row) for row in rows}


def quiet() -> None:
    """One thread, and nothing of other libraries between the rows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("teacher_cache").setLevel(logging.ERROR)


class TooLong(BaseException):
    """A row that takes longer than `SECONDS`; no error that anything handles."""


def tried(task: TaskName, name: str, log: Path | None) -> Found | None:
    """An architecture's row; None where transformers itself does not build or run it that small."""
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return _tried(task, name, log)
    except TooLong:
        print(f"{task} {name}: not built (more than {SECONDS} s)", flush=True)
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*_: Any) -> None:
    raise TooLong


def _tried(task: TaskName, name: str, log: Path | None) -> Found | None:
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        try:
            write_tiny(task, name, teacher)
            expected = plain(task, name, teacher)
        except Exception as error:
            print(
                f"{task} {name}: not built ({type(error).__name__}: {str(error)[:150]})", flush=True
            )
            return None
        found = Found(name)
        for what, options in OPTIONS[task].items():
            check(
                found,
                what,
                lambda o=options, w=what: compared(task, w, o, teacher, expected, found),
            )
    print(f"{task} {name}: {found.rows} {found.said}", flush=True)
    if log is not None:
        with log.open("a") as file:
            print(json.dumps({"task": task, **vars(found)}), file=file)
    return found


NAMES: Mapping[TaskName, Mapping[str, Any]] = {
    "lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "lm": {
        "logits": {"codec": "topk", "top_k": 16},
        "hidden": {"codec": "hidden"},
        "maps": {"codec": "topk", "top_k": 16, "attention": "mean", "attention_layers": "all"},
        "states": {"codec": "topk", "top_k": 16, "hidden": "last,0"},
    },
    "classification": {
        "logits": {},
        "pooled": {"hidden": "pooled"},
        "maps": {"attention": "mean", "attention_layers": "all"},
        "states": {"hidden": "last,0"},
    },
}


def check(found: Found, what: str, run: Callable[[], str]) -> None:
    """Note what became of one thing."""
    try:
        found.said[what] = run()
    except TeacherCacheError as error:
        found.said[what] = f"refused: {error}"
    except Exception as error:
        found.said[what] = f"TRACEBACK {type(error).__name__}: {str(error)[:120]}"
        found.faults.append(what)
    if found.said[what].startswith("WRONG"):
        found.faults.append(what)


def compared(
    task: TaskName,
    what: str,
    options: Mapping[str, Any],
    teacher: Path,
    expected: Sequence[Mapping[str, Any]],
    found: Found,
) -> str:
    """Cache it, and say how far it is from each document alone."""
    cache = teacher.parent / what
    config = cache_teacher.CacheTeacherConfig.of(
        task=task, name="it", teacher=str(teacher), device="cpu", max_length=MAX_LENGTH,
        labeled=CorpusConfig(source=str(data(teacher.parent, found.name)), labeled=task != "lm"),
        out=cache,
        **options,
    )  # fmt: skip
    cache_teacher.run(config)
    reader = CacheReader(cache, "labeled")
    found.rows = reader.manifest.about["batching"]["rows"]
    worst = max(DISTANCES[task](reader, expected), key=lambda one: one[0] / one[1])
    return "exact" if worst[0] <= worst[1] else f"WRONG by {worst[0]:.3g}"


def page(tables: Mapping[str, Sequence[Found]]) -> str:
    """docs/teachers.md."""
    lines = [
        "# Teachers",
        "",
        f"Every text architecture of transformers {version('transformers')}, tiny and random,",
        "through stage one in float32 on a CPU: each cached value against a plain forward pass of",
        "that document alone; made by `python -m benchmarks.teachers`. Exact: within rounding.",
        "Rows: how documents share a pass, as measured when a teacher is loaded.",
    ]
    for task, rows in tables.items():
        columns = list(OPTIONS[task])
        title = "Causal language models" if task == "lm" else "Sequence classifiers"
        exact = sum(one.said["logits"] == "exact" for one in rows)
        missing = len(NAMES[task]) - len(LEFT_OUT[task].split()) - len(rows)
        lines += ["", f"## {title}: {exact} of {len(rows)} exact", ""]
        if missing:
            lines += [f"{missing} more types are not made that small here, and not tried.", ""]
        lines += [f"| architecture | rows | {' | '.join(columns)} |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        for one in rows:
            cells = [short(one.said[column]) for column in columns]
            lines.append(f"| {one.name} | {one.rows or ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short(said: str) -> str:
    """A cell, without the folder in which the teacher lay."""
    return re.sub(r"\S+/teacher", "it", said).replace("|", "/").replace("\n", " ")[:110]


def data(folder: Path, name: str) -> Path:
    """Documents with labels, which a language model does not read."""
    path = folder / "data.jsonl"
    rows = [{"text": text, "label": f"c{i % 3}"} for i, text in enumerate(texts(name))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(name: str) -> list[str]:
    """Of random words."""
    rng = np.random.default_rng(0)
    words, space = (ascii_letters, "") if name in OF_BYTES else (WORDS, " ")
    return [space.join(rng.choice(list(words), n)) for n in LENGTHS]


def tokenizer_of(task: TaskName, name: str) -> PreTrainedTokenizerFast:
    """Words, and for a classifier special tokens around them."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if name in OF_BYTES:
        ids = {word: i for i, word in enumerate([*special, *ascii_letters])}
        tokenizer = Tokenizer(BPE(ids, []))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if task != "lm":
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]",
    )  # fmt: skip


def auto_class(task: TaskName) -> Any:
    """Of transformers."""
    lm = task == "lm"
    return getattr(
        transformers, "AutoModelForCausalLM" if lm else "AutoModelForSequenceClassification"
    )


def write_tiny(task: TaskName, name: str, folder: Path) -> None:
    """A small model of a type, saved with its tokenizer.

    Where a class does not take all small values together, others are tried.
    """
    tried_values = (
        SMALL,
        {**SMALL, "num_key_value_heads": SMALL["num_attention_heads"]},
        {key: value for key, value in SMALL.items() if "head_dim" not in key},
        {key: SMALL[key] for key in FEW.split()},
    )
    reasons = []
    for small in tried_values:
        try:
            build(task, name, folder, small)
            plain(task, name, folder)
            return
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:80]}")
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def build(task: TaskName, name: str, folder: Path, small: Mapping[str, Any]) -> None:
    """A model of a type with these values."""
    torch.manual_seed(0)
    if name in CONSTRUCTED:
        config = constructed(CONFIG_MAPPING[name], CONSTRUCTED[name])
    else:
        config = CONFIG_MAPPING[name]()
        for one in (config, config.get_text_config()):
            shrink(one, {**small, **SPECIAL.get(name, {})})
    config.num_labels = 3
    config.id2label = {0: "c0", 1: "c1", 2: "c2"}
    config.label2id = {label: i for i, label in config.id2label.items()}
    if task == "lm":
        config.is_decoder = True
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        size = sum(one.numel() for one in auto_class(task).from_config(config).parameters())
    if size > 2e7:
        raise ValueError(f"it does not become small ({size:,} parameters)")
    model = auto_class(task).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.clamp_(-1, 1)
    model.save_pretrained(folder)
    tokenizer_of(task, name).save_pretrained(folder)


def constructed(kind: Any, given: Mapping[str, Any]) -> Any:
    """A configuration of the small values that it has, and of what is given, at every level."""
    default = kind()
    values = {name: SMALL[name] for name in SMALL if name in default.to_dict()}
    within = {name: one for name, one in vars(default).items() if isinstance(one, PreTrainedConfig)}
    made = {inner: constructed(type(one), given.get(inner, {})) for inner, one in within.items()}
    return kind(**{**values, **given, **made})


def shrink(config: Any, small: Mapping[str, Any]) -> None:
    """Give a configuration the small values of the names that it has."""
    layers = 2
    for name, value in small.items():
        has_number = isinstance(getattr(config, name, None), (int, float))
        if has_number or name in ("pad_token_id", "decoder_start_token_id"):
            with contextlib.suppress(Exception):  # names that a class computes and does not store
                setattr(config, name, value)
    for name, value in list(vars(config).items()):
        # One entry a layer, as kinds of layers are listed.
        if isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
            setattr(config, name, kinds(value, layers))


def kinds(listed: Sequence[Any], num: int) -> list[Any]:
    """The first of each kind that a list names, as many as there are layers."""
    seen = list(dict.fromkeys(listed))
    return (seen + [seen[-1]] * num)[:num]


def plain(task: TaskName, name: str, folder: Path) -> list[dict[str, Any]]:
    """What the model says of each document alone."""
    auto = auto_class(task)
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    # Maps come of attention that forms them, as stage one loads it.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(texts(name)[0])["input_ids"]
    if len(ids) < LENGTHS[0] or tokenizer.unk_token_id in ids:
        raise ValueError("its class of tokenizer reads other files")
    eager = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=EAGER).eval()
    found = []
    for text in texts(name):
        ids = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        given = torch.tensor([ids if task != "lm" else [*ids, 2][:MAX_LENGTH]])
        kwargs = {"use_cache": False} if task == "lm" else {}
        with torch.no_grad():
            logits = model(input_ids=given, **kwargs).logits[0].float()
            base = None
            with contextlib.suppress(Exception):  # of models whose base asks for more
                base = base_of(eager)(input_ids=given, output_attentions=True)
        found.append(
            {"ids": given[0].numpy(), "logits": logits, "base": base, "num_ids": len(tokenizer)}
        )
    return found


def samples_of(reader: CacheReader) -> Iterator[dict[str, Any]]:
    """All of a split."""
    return (reader.sample(i) for i in range(len(reader)))


Distance = tuple[float, float]
"""How far it is, and how far rounding may take it."""


def of_classifier(reader: CacheReader, expected: Sequence[Mapping[str, Any]]) -> Iterator[Distance]:
    """Of each sample."""
    known = {tuple(one["ids"].tolist()): one for one in expected}
    for sample in samples_of(reader):
        one = known[tuple(sample["input_ids"].tolist())]
        yield float(np.abs(one["logits"].numpy() - sample["class_logits"]).max()), CLASS_LOGIT
        yield from of_layers(reader, sample, 0, one)


def of_language_model(
    reader: CacheReader, expected: Sequence[Mapping[str, Any]]
) -> Iterator[Distance]:
    """Of each piece that is a whole document: next tokens' log-probs, and distributions."""
    known = {tuple(one["ids"].tolist()): one for one in expected}
    codec = open_codec(reader, torch.device("cpu"))
    for sample in samples_of(reader):
        rows = codec.expand(sample)
        for piece in np.unique(sample["segment"]):
            where = np.flatnonzero(sample["segment"] == piece)
            one = known.get(tuple(sample["input_ids"][where].tolist()))
            if one is None:  # a piece of a document that goes on
                continue
            log_probs = one["logits"][:, : one["num_ids"]].log_softmax(-1)
            following = torch.from_numpy(one["ids"][1:].astype(np.int64))
            exact = log_probs[torch.arange(len(following)), following].numpy()
            stored = sample["next_log_prob"][where[:-1]].astype(float)
            yield float((np.abs(exact - stored) - HALF * np.abs(exact)).max(initial=0.0)), LOG_PROB
            decoded = codec.decode(
                {name: torch.from_numpy(values[where]) for name, values in rows.items()}, 1.0
            )
            own = log_probs if decoded.ids is None else log_probs.gather(1, decoded.ids.long())
            off = (decoded.log_probs - own).abs() - HALF * own.abs()
            yield float(off.where(own > LIKELY, 0.0).max()), LOG_PROB
            yield from of_layers(reader, sample, int(piece), one)


def of_layers(
    reader: CacheReader, sample: Mapping[str, Any], piece: int, one: Mapping[str, Any]
) -> Iterator[Distance]:
    """Of last states, by their length, and of ordinary maps, the mean over their heads."""
    base = one["base"]
    lengths = np.bincount(sample.get("segment", np.zeros(len(one["ids"]), int))).tolist()
    start = sum(lengths[:piece])
    if base is not None and "hidden" in sample and "hidden_0" in sample:
        exact = base.last_hidden_state[0].float().numpy()
        stored = sample["hidden"][start : start + len(exact)].astype(float)
        apart = np.linalg.norm(exact - stored, axis=1) / np.linalg.norm(exact, axis=1)
        yield float(apart.max()), STATE
    maps = [one for one in getattr(base, "attentions", None) or () if is_map(one)]
    names = sorted((name for name in sample if name.startswith("attention_")), key=layer_of)
    if not names or len(maps) != len(names):
        return
    codec = attention_from(reader.manifest.settings)
    assert codec is not None, "it holds maps"
    for exact, name in zip(maps, names, strict=True):
        stored = codec.split(sample[name], lengths)[piece]
        rows = exact[0].float().mean(dim=0).numpy()
        decoded = codec.decode(stored, len(rows))
        # A row of a model with sinks sums to less than 1, and is stored as a distribution.
        yield float(row_kl(rows / rows.sum(axis=1, keepdims=True), decoded).max()), MAP_KL


def is_map(one: Any) -> bool:
    """[1, H, S, S]."""
    return isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[2] == one.shape[3]


def layer_of(name: str) -> int:
    """Of a field of maps."""
    return int(name.rsplit("_", 1)[1])


DISTANCES = {"lm": of_language_model, "classification": of_classifier}


if __name__ == "__main__":
    main()
