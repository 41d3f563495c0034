from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks import packaged_tokenizers
from benchmarks.packaged_tokenizers import smollm2_tokenizer_folder
from teacher_cache.cache.errors import UserError


def test_smollm2s_ids(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(smollm2_tokenizer) == 49_152
    text = "In 1984  the rain\n"
    tokens = smollm2_tokenizer.tokenize(text)
    assert tokens == ["In", "Ġ", "1", "9", "8", "4", "Ġ", "Ġthe", "Ġrain", "Ċ"]
    assert smollm2_tokenizer.decode(smollm2_tokenizer(text)["input_ids"]) == text
    assert smollm2_tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert smollm2_tokenizer.eos_token == "<|im_end|>"


def test_is_made_once_and_comes_back(
    smollm2_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged_tokenizers, "fetch", lambda name: pytest.fail("fetched again"))
    assert (smollm2_tokenizer_folder() / "tokenizer.json").is_file()


def test_another_kind_of_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_CACHE_ASSETS", str(tmp_path))
    monkeypatch.setattr(packaged_tokenizers, "fetch", lambda name: tmp_path)
    monkeypatch.setattr(
        packaged_tokenizers,
        "read_metadata",
        lambda stream: {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["a"],
            "llama.context_length": 1,
        },
    )
    (tmp_path / packaged_tokenizers.SMOLLM2_FILE).touch()
    with pytest.raises(UserError, match=r"'llama'.*expected gpt2"):
        smollm2_tokenizer_folder()
