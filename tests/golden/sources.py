"""Teachers, tokenizers and texts that are the same bytes on every machine.

No generator of random numbers and no library's way of saving a model has a say in them: weights
are fractions of whole numbers, which float32 holds exactly, and every file is written from here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WORDS = (
    *("the", "film", "plot", "is", "was", "warm", "dull", "funny", "slow", "and", "but", "never"),
    *("drags", "shines", "we", "laughed", "slept", "a", "story", "of", "love", "war", "ends"),
    "too",
)
CLASS_NAMES = ("neg", "pos")
WIDTH = 8
NUM_LAYERS = 2
NUM_POSITIONS = 32
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "<|endoftext|>"
SPACE = "\u0120"  # what a byte-level tokenizer writes for it

Shapes = dict[str, tuple[int, ...]]


def write_sources(folder: Path) -> None:
    """Write `teachers/` and `data/` into the folder."""
    _write_teacher(
        folder / "teachers/classifier", _bert_config(), _bert_shapes(), word_tokenizer(), SPECIAL
    )
    for name, words in {"language": WORDS[:9], "other": WORDS[:9:2]}.items():
        tokenizer = byte_tokenizer(words)
        num_ids = len(tokenizer["model"]["vocab"])
        config, shapes = _gpt2_config(num_ids), _gpt2_shapes(num_ids)
        _write_teacher(folder / "teachers" / name, config, shapes, tokenizer, (END,))
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    _write_reviews(data / "reviews.jsonl", range(12))
    _write_reviews(data / "held-out.jsonl", range(40, 52))
    _write_lines(data / "unlabeled.txt", range(20, 26))
    _write_lines(data / "prose.txt", range(28, 40))
    _write_lines(data / "held-out.txt", range(52, 58))


def numbers(name: str, count: int) -> np.ndarray:
    """So many whole numbers below 2**32 that look like chance, of this name. [count] uint32."""
    mixed = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
    mixed += np.uint32(zlib.crc32(name.encode()))
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(2246822519)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(3266489917)
    return mixed ^ (mixed >> np.uint32(16))


def text(number: int) -> str:
    """The document of this number: empty, as another, over-long, or of two to six words."""
    if number % 20 == 5:
        return ""
    if number % 20 == 7:
        return text(number - 1)
    drawn = numbers(f"text {number}", 64)
    num_words = 20 if number % 20 == 3 else 2 + int(drawn[-1]) % 5
    return " ".join(WORDS[int(one) % len(WORDS)] for one in drawn[:num_words])


def word_tokenizer() -> dict[str, Any]:
    """Whole words between [CLS] and [SEP], as tokenizer.json."""
    ids = {token: idx for idx, token in enumerate((*SPECIAL, *WORDS))}
    between = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    special = {
        token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
    }
    return _tokenizer(
        SPECIAL,
        model={"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"},
        pre_tokenizer={"type": "Whitespace"},
        post_processor={
            "type": "TemplateProcessing",
            "single": between,
            "pair": [*between, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        },
    )


def byte_tokenizer(words: Sequence[str]) -> dict[str, Any]:
    """Letters, merged from the left into these words behind a space, as tokenizer.json."""
    letters = [*sorted({*chain.from_iterable(WORDS)}), SPACE]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        whole = SPACE + word
        merges |= {(whole[:end], whole[end]): None for end in range(1, len(whole))}
    tokens = [END, *letters, *(left + right for left, right in merges)]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _tokenizer(
        (END,),
        model={
            "type": "BPE",
            "vocab": {token: idx for idx, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
        pre_tokenizer=as_bytes | {"use_regex": True},
        decoder=as_bytes | {"use_regex": True},
    )


def _tokenizer(special: Sequence[str], **parts: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": idx, "content": token, "special": True} | flags
            for idx, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    } | parts


def _write_teacher(
    folder: Path,
    config: dict[str, Any],
    shapes: Shapes,
    tokenizer: dict[str, Any],
    special: Sequence[str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    roles = {f"{token.strip('[]').lower()}_token": token for token in special if token[0] == "["}
    roles |= {"bos_token": END, "eos_token": END} if END in special else {}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": NUM_POSITIONS}
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", about | roles)
    weights = {name: _weight(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/64 from -2 to 2, of vectors an eighth of it; scales of norms around 1."""
    whole = (numbers(name, int(np.prod(shape))) >> np.uint32(24)).astype(np.int32) - 128
    values = whole.astype(np.float32).reshape(shape) / 64
    if len(shape) > 1:
        return values
    return values / 8 + (1 if name.endswith("weight") else 0)


def _bert_config() -> dict[str, Any]:
    return {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": NUM_POSITIONS,
        "pad_token_id": 0,
        "id2label": {str(idx): name for idx, name in enumerate(CLASS_NAMES)},
        "label2id": {name: idx for idx, name in enumerate(CLASS_NAMES)},
    }


def _bert_shapes() -> Shapes:
    norm, square = (WIDTH,), (WIDTH, WIDTH)
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (len(SPECIAL) + len(WORDS), WIDTH),
        "bert.embeddings.position_embeddings.weight": (NUM_POSITIONS, WIDTH),
        "bert.embeddings.token_type_embeddings.weight": (2, WIDTH),
        **_with_bias("bert.embeddings.LayerNorm", norm),
        **_with_bias("bert.pooler.dense", square),
        **_with_bias("classifier", (len(CLASS_NAMES), WIDTH)),
    }
    for layer in range(NUM_LAYERS):
        at = f"bert.encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _with_bias(f"{at}.attention.{name}", square)
        shapes |= _with_bias(f"{at}.attention.output.LayerNorm", norm)
        shapes |= _with_bias(f"{at}.intermediate.dense", (2 * WIDTH, WIDTH))
        shapes |= _with_bias(f"{at}.output.dense", (WIDTH, 2 * WIDTH))
        shapes |= _with_bias(f"{at}.output.LayerNorm", norm)
    return shapes


def _gpt2_config(num_ids: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": num_ids,
        "n_embd": WIDTH,
        "n_layer": NUM_LAYERS,
        "n_head": 2,
        "n_positions": NUM_POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _gpt2_shapes(num_ids: int) -> Shapes:
    shapes: Shapes = {
        "transformer.wte.weight": (num_ids, WIDTH),
        "transformer.wpe.weight": (NUM_POSITIONS, WIDTH),
        **_with_bias("transformer.ln_f", (WIDTH,)),
    }
    for layer in range(NUM_LAYERS):
        at = f"transformer.h.{layer}"
        shapes |= _with_bias(f"{at}.ln_1", (WIDTH,)) | _with_bias(f"{at}.ln_2", (WIDTH,))
        # Of this architecture alone, weights are [input, output].
        for name, out in {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4}.items():
            shapes |= _with_bias(f"{at}.{name}", (WIDTH, out * WIDTH), bias=out * WIDTH)
        shapes |= _with_bias(f"{at}.mlp.c_proj", (4 * WIDTH, WIDTH), bias=WIDTH)
    return shapes


def _with_bias(name: str, shape: tuple[int, ...], *, bias: int | None = None) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (bias or shape[0],)}


def _write_reviews(path: Path, documents: range) -> None:
    rows = [
        {"text": text(number), "label": CLASS_NAMES[int(numbers(f"label {number}", 1)[0]) % 2]}
        for number in documents
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_lines(path: Path, documents: range) -> None:
    path.write_text("".join(text(number) + "\n" for number in documents))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
