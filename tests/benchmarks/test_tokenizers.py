"""Ten real tokenizers of all kinds, byte for byte, against decoders alone; and a fault shows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from benchmarks.tokenizers import SAMPLE, TEXTS, check_pair, folder_of, page, row_of, wrong_ids
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.tokens.tokenizers import load_tokenizer

# Texts that a tokenizer's tokens keep, of all; the others are said to be lost.
KEPT = {
    "gpt2": len(TEXTS),
    "smollm2": len(TEXTS),
    "minilm": 1,
    "gemma3": len(TEXTS),
    "qwen3": len(TEXTS) - 1,
    "llama2": len(TEXTS) - 2,
    "claude": len(TEXTS) - 5,
    "deepseek_v4": len(TEXTS),
    "nepali-sp": 14,
    "mon": 23,
}
PAIRS = [
    ("gemma3", "gpt2"),
    ("gpt2", "gemma3"),
    ("llama2", "qwen3"),
    ("qwen3", "llama2"),
    ("gpt2", "minilm"),
    ("minilm", "llama2"),
    ("nepali-sp", "claude"),
    ("mon", "nepali-sp"),
    ("deepseek_v4", "smollm2"),
]


@cache
def reader(name: str) -> Reader:
    return Reader.of(load_tokenizer(str(folder_of(name)), option="--teacher"))


@pytest.mark.parametrize("name", SAMPLE)
def test_a_text_comes_back_byte_for_byte_or_what_is_lost_is_said(name: str) -> None:
    row = row_of(reader(name))
    assert row["wrong_ids"] == [] and row["silent_texts"] == []
    assert row["num_texts"] == KEPT[name]
    # Spaces that Llama 2 cannot tell from its own are counted text by text, and no caveat.
    assert (row["caveat"] is None) == (KEPT[name] >= len(TEXTS) - 2 and name != "qwen3")


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_nothing_is_compared_that_is_not_the_same(teacher: str, student: str) -> None:
    counts = check_pair(reader(teacher), reader(student))
    assert (counts.num_unequal, counts.num_other_targets, counts.num_apart) == (0, 0, 0)
    assert counts.num_chunks > 100 and counts.num_one_to_one > 100


def test_the_judge_sees_a_wrong_table() -> None:
    right = reader("llama2")
    content = list(right.table.content)
    token_id = right.table.text_ids[b" the"]
    content[token_id] = b" teh"
    assert wrong_ids(replace(right, table=replace(right.table, content=tuple(content)))) == [
        token_id
    ]
    content[token_id] = None
    lost = replace(right, table=replace(right.table, content=tuple(content)))
    assert (
        check_pair(reader("gpt2"), lost).num_mapped < check_pair(reader("gpt2"), right).num_mapped
    )


def test_the_page_names_what_is_refused() -> None:
    found = page(
        {
            "rows": {"gpt2": row_of(reader("gpt2")) | {"from": "a package"}},
            "pairs": {},
            "refused": {"clip": ["another", "its tokens end words"]},
        }
    )
    assert "| gpt2 | a package | 50,257 |" in found
    assert "| clip | another | its tokens end words |" in found
