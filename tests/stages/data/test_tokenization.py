from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.data.tokenization import tokenize

TEXTS = ["A fine film.", "", "It was long, " * 50, " \n\t", "Dull."]


def _documents(texts: list[str]) -> list[Document]:
    return [Document(text, "test", "train", idx, label=idx) for idx, text in enumerate(texts)]


def test_adds_special_tokens_and_drops_empty_texts(bert_tokenizer):
    samples = tokenize(_documents(TEXTS), bert_tokenizer, max_length=512)
    assert [sample.label for sample in samples] == [0, 2, 4]
    assert bert_tokenizer.decode(samples[0].input_ids) == "[CLS] a fine film. [SEP]"
    assert all(sample.input_ids.dtype == np.uint32 for sample in samples)
    assert [sample.sample_id for sample in samples] == [
        document.sample_id for document in _documents(TEXTS) if document.text.strip()
    ]


def test_cuts_and_marks_what_is_too_long(bert_tokenizer):
    samples = tokenize(_documents(TEXTS), bert_tokenizer, max_length=16)
    assert [sample.was_truncated for sample in samples] == [False, True, False]
    assert len(samples[1].input_ids) == 16
    assert samples[1].input_ids[-1] == bert_tokenizer.sep_token_id


def test_a_sample_of_exactly_the_limit_is_whole(bert_tokenizer):
    (whole,) = tokenize(_documents(TEXTS[:1]), bert_tokenizer, max_length=512)
    (same,) = tokenize(_documents(TEXTS[:1]), bert_tokenizer, max_length=len(whole.input_ids))
    assert not same.was_truncated
    assert same.input_ids.tolist() == whole.input_ids.tolist()


def test_a_tokenizer_without_special_tokens(gpt2_tokenizer):
    samples = tokenize(_documents(TEXTS), gpt2_tokenizer, max_length=4)
    assert gpt2_tokenizer.decode(samples[0].input_ids) == TEXTS[0]
    assert [sample.was_truncated for sample in samples] == [False, True, False]


def test_the_tokenizers_own_padding_and_truncation_do_not_matter(bert_tokenizer):
    other = AutoTokenizer.from_pretrained(fetch("minilm"))
    other(TEXTS, padding="max_length", truncation=True, max_length=8)
    other.padding_side = "left"
    expected = tokenize(_documents(TEXTS), bert_tokenizer, max_length=64)
    for sample, same in zip(
        tokenize(_documents(TEXTS), other, max_length=64), expected, strict=True
    ):
        assert sample.input_ids.tolist() == same.input_ids.tolist()


def test_the_tokenizers_side_of_truncation_does(minilm_dir: Path):
    left = AutoTokenizer.from_pretrained(minilm_dir, truncation_side="left")
    (sample,) = tokenize(_documents(["one two three four five"]), left, max_length=4)
    assert left.decode(sample.input_ids) == "[CLS] four five [SEP]"


def test_more_documents_than_a_batch(bert_tokenizer):
    samples = tokenize(
        _documents([f"film {idx}" for idx in range(1100)]), bert_tokenizer, max_length=8
    )
    assert [sample.label for sample in samples] == list(range(1100))


@pytest.mark.parametrize("max_length", [0, 1, 2])
def test_refuses_a_length_without_room_for_text(bert_tokenizer, max_length):
    with pytest.raises(UserError, match="adds 2 special tokens, so give at least 3"):
        tokenize(_documents(TEXTS), bert_tokenizer, max_length=max_length)


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=5), st.integers(3, 20))
def test_equals_one_document_at_a_time(bert_tokenizer, texts, max_length):
    samples = tokenize(_documents(texts), bert_tokenizer, max_length=max_length)
    expected = [text for text in texts if text.strip()]
    assert len(samples) == len(expected)
    for sample, text in zip(samples, expected, strict=True):
        whole = bert_tokenizer(text)["input_ids"]
        cut = bert_tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert sample.input_ids.tolist() == cut
        assert sample.was_truncated == (len(whole) > max_length)
