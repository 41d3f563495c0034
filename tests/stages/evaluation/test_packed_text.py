"""Bits a byte are counted by the bytes of the file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import packed_rows
from teacher_cache.stages.evaluation.config import GenerationOptions
from teacher_cache.stages.evaluation.language_modeling import continuation, prompt_ids
from teacher_cache.stages.evaluation.scores import num_bytes_by_id, num_predicted_bytes
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace, tiny_sentencepiece

CODE = "def f(x):\n    x x\n\n\n\tx     x\n"


def documents(*texts: str) -> list[Document]:
    return [Document(text, "test", "train", idx) for idx, text in enumerate(texts)]


@pytest.mark.parametrize("max_length", [4, 9, 64])
@pytest.mark.parametrize("make", [tiny_gemma, tiny_sentencepiece])
def test_every_byte_of_the_files_counts_once(make: Any, max_length: int) -> None:
    """Behind a begin token all of a text is predicted, wherever it is cut."""
    tokenizer = make()
    texts = (CODE, "ab ab a", "  ab", f"ab{tokenizer.unk_token}a{tokenizer.eos_token}ab a")
    rows = packed_rows(documents(*texts), tokenizer, max_length=max_length)
    num, caveat = num_predicted_bytes(rows, tokenizer)
    # Special tokens that a text spells are no text.
    texts = (*texts[:-1], "abaab a")
    assert (num, caveat) == (sum(len(text.encode()) for text in texts), None)


def test_without_a_begin_the_first_token_is_not_predicted(
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = packed_rows(documents("The film is good"), gpt2_tokenizer, max_length=64)
    assert num_predicted_bytes(rows, gpt2_tokenizer) == (len(" film is good"), None)


def test_what_tokens_lose_is_said(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = packed_rows(documents("a{a"), tiny_metaspace(), max_length=64)
    _, caveat = num_predicted_bytes(rows, tiny_metaspace())
    assert caveat is not None and "1 unknown tokens count for no byte" in caveat
    _, caveat = num_bytes_by_id(bert_tokenizer)
    assert caveat is not None and "capital letters" in caveat


class _Writer:
    """Writes given ids behind any prompt, and goes on behind their end unless it is told of it."""

    def __init__(self, written: list[int]):
        self.written, self.device = written, torch.device("cpu")
        self.config = SimpleNamespace(pad_token_id=0, eos_token_id=None)
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def generate(self, input_ids: torch.Tensor, eos_token_id: list[int], **_: Any) -> torch.Tensor:
        assert eos_token_id is not None
        return torch.cat([input_ids, torch.tensor([self.written])], dim=1)


def _model(tokenizer: Any, written: list[int]) -> Any:
    return SimpleNamespace(
        name="run",
        tokenizer=tokenizer,
        model=_Writer(written),
        autocast=torch.float32,
        num_positions=512,
    )


def test_a_prompt_ends_before_what_stands_behind_a_text(
    bert_tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = prompt_ids(_model(bert_tokenizer, []), "the film")
    assert bert_tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "film"]
    tokenizer = tiny_gemma()
    ids = prompt_ids(_model(tokenizer, []), "<bos>def")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "def"]


def test_what_is_written_stops_at_the_frame_and_keeps_its_space(
    bert_tokenizer: PreTrainedTokenizerBase,
) -> None:
    for tokenizer, prompt, text, after in (
        (bert_tokenizer, "the film", " is good.", "[SEP]"),
        (tiny_sentencepiece(), "ab", " ab a", "</s>"),
        (tiny_metaspace(), "a", " a b", "</s>"),
    ):
        inner = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        written = inner[len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) :]
        end = tokenizer.get_vocab()[after]
        model = _model(tokenizer, [*written, end, *written])
        ids = prompt_ids(model, prompt)
        assert continuation(model, ids, GenerationOptions()) == text
