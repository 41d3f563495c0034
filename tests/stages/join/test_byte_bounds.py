from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.tokens.byte_bounds import TokenSpans, spans_of_bytes, tokenize_with_spans
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes

Named = dict[str, tuple[PreTrainedTokenizerBase, TokenBytes]]
HARD_TEXTS = [
    "",
    "a",
    "  two  spaces\n\n\tand a tab ",
    "👩‍🚀🚀 naïve e\u0301 ﬁ ½ 你好。世界 — x",
    "<|endoftext|> spelt out <s> [SEP] <|im_start|>",
    "control \x00\x06\x13 \u0085 \u200b characters \ufffd",
    "1984 12,345.67",
    "\U000e0041 \U00050000",
]


texts = st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=30))


@settings(max_examples=60)
@given(text=texts)
def test_gpt2s_tokens_lie_where_their_bytes_are(named: Named, text: str) -> None:
    tokenizer, table = named["gpt2"]
    (spans,) = tokenize_with_spans([text], tokenizer, table)
    data = text.encode()
    assert spans.bounds[0] == 0 and spans.bounds[-1] == len(data)
    for idx, token_id in enumerate(spans.ids.tolist()):
        assert data[spans.bounds[idx] : spans.bounds[idx + 1]] == table.content[token_id]


@pytest.mark.parametrize("name", ["smollm2", "bert", "sentencepiece"])
@settings(max_examples=60)
@given(text=texts)
def test_every_byte_is_in_one_token(name: str, named: Named, text: str) -> None:
    tokenizer, table = named[name]
    (spans,) = tokenize_with_spans([text], tokenizer, table)
    assert spans.ids.tolist() == tokenizer(text)["input_ids"]
    assert spans.bounds[0] == 0
    # BERT has no token at all for a text of spaces.
    assert spans.bounds[-1] == (len(text.encode()) if spans.is_text.any() else 0)


def test_parts_of_a_character_have_borders_of_their_own(
    gpt2_tokenizer: PreTrainedTokenizerBase, gpt2_table: TokenBytes
) -> None:
    (spans,) = tokenize_with_spans(["a🚀b"], gpt2_tokenizer, gpt2_table)
    assert spans.bounds.tolist() == [0, 1, 3, 4, 5, 6]


def test_trimmed_offsets_make_no_difference(
    gpt2_tokenizer: PreTrainedTokenizerBase, gpt2_table: TokenBytes
) -> None:
    keeping, trimming = copy.deepcopy(gpt2_tokenizer), copy.deepcopy(gpt2_tokenizer)
    backend: Any = getattr(trimming, "backend_tokenizer")  # noqa: B009 -- pyright knows it not
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    spaced = ["  a 🚀 the  end ", " ", " \n x"]
    for max_length in (None, 3):
        for side in ("left", "right"):
            keeping.truncation_side = trimming.truncation_side = side
            plain = tokenize_with_spans(spaced, keeping, gpt2_table, max_length=max_length)
            trimmed = tokenize_with_spans(spaced, trimming, gpt2_table, max_length=max_length)
            for ours, theirs in zip(plain, trimmed, strict=True):
                assert ours.bounds.tolist() == theirs.bounds.tolist()


def test_berts_spaces_go_to_the_next_token_and_its_own_tokens_have_no_width(
    bert_tokenizer: PreTrainedTokenizerBase, bert_table: TokenBytes
) -> None:
    (spans,) = tokenize_with_spans(["The  naïve 🚀end. "], bert_tokenizer, bert_table)
    strings = bert_tokenizer.convert_ids_to_tokens(spans.ids.tolist())
    assert strings == ["[CLS]", "the", "naive", "[UNK]", ".", "[SEP]"]
    assert spans.bounds.tolist() == [0, 0, 3, 11, 19, 21, 21]
    assert spans.is_text.tolist() == [False, True, True, True, True, False]


def test_sentencepieces_first_space_is_not_in_the_text(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    table = token_bytes(sentencepiece)
    ab, emoji = tokenize_with_spans(["ab éa", "🚀 ab"], sentencepiece, table)
    assert sentencepiece.convert_ids_to_tokens(ab.ids.tolist()) == ["<s>", "▁ab", "▁", "é", "a"]
    assert ab.bounds.tolist() == [0, 0, 2, 3, 5, 6]
    # The `▁` before an emoji is text without bytes; the emoji's four bytes have a token each.
    assert emoji.bounds.tolist() == [0, 0, 0, 1, 2, 3, 4, 7]
    assert emoji.is_text.tolist() == [False, *[True] * 6]


@pytest.mark.parametrize(
    ("side", "expected"), [("right", [0, 0, 3, 7, 7]), ("left", [8, 8, 13, 18, 18])]
)
def test_a_cut_text_keeps_its_places(
    side: str, expected: list[int], bert: PreTrainedTokenizerBase, bert_table: TokenBytes
) -> None:
    bert.truncation_side = side
    (cut,) = tokenize_with_spans(["one two three four"], bert, bert_table, max_length=4)
    assert cut.bounds.tolist() == expected


def test_bytes_that_are_no_characters(gpt2_table: TokenBytes) -> None:
    data = b"a\xff\xfe\x80"
    ids = [gpt2_table.content.index(bytes([byte])) for byte in data]
    spans = spans_of_bytes([50256, *ids], gpt2_table)
    assert spans.bounds.tolist() == [0, 0, 1, 2, 3, 4]
    assert spans.is_text.tolist() == [False, True, True, True, True]


def test_spans_that_cannot_be_are_refused() -> None:
    ids, text = np.array([1, 2]), np.array([True, True])
    for bounds, is_text, message in (
        ([0, 1], text, "2 bounds"),
        ([0, 2, 1], text, "decrease"),
        ([0, 1, 2], np.array([True, False]), "stands for no text"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenSpans(ids=ids, bounds=np.array(bounds), is_text=is_text)


def test_a_combining_mark_that_no_token_covers_belongs_to_the_token_before(gpt2_tokenizer) -> None:
    """An NFC tokenizer over text whose marks stand apart: the border is behind the mark."""
    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    (spans,) = tokenize_with_spans(["cafe\u0301 au"], tokenizer, token_bytes(tokenizer))
    words = tokenizer.convert_ids_to_tokens(spans.ids.tolist())
    assert spans.bounds[words.index("Ġau")] == len("cafe\u0301".encode())
    assert spans.bounds[-1] == len("cafe\u0301 au".encode())
