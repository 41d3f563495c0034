"""What a model reads of a text, with real tokenizers."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from teacher_cache.stages.data.tokenization import Reading

TEXT = "the film was good and the end was not"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 6, 400])
def test_the_part_that_is_read_has_the_same_tokens(
    bert_tokenizer: PreTrainedTokenizerFast, side: str, max_length: int
) -> None:
    tokenizer = bert_tokenizer.__class__.from_pretrained(bert_tokenizer.name_or_path)
    tokenizer.truncation_side = side
    reading = Reading.of(tokenizer, max_length=max_length)
    (part,) = reading.cut(TEXT)
    assert reading.ids(part) == reading.ids(TEXT)
    assert (TEXT.startswith if side == "right" else TEXT.endswith)(part)
    assert (part == TEXT) == (max_length == 400)
    assert reading.mask_token == tokenizer.mask_token


def test_a_text_of_no_tokens_is_not_read(bert_tokenizer: PreTrainedTokenizerFast) -> None:
    assert Reading.of(bert_tokenizer, max_length=8).cut("") == ("",)
