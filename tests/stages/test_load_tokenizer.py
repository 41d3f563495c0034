"""What cannot be read is one sentence, with the library that would read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.tokens import tokenizers
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from tests.tiny_tokenizers import tiny_gemma

FILES = {
    "mistral-common": ("tekken.json", b"{}"),
    "tiktoken": ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
    "sentencepiece": ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"),
}


@pytest.mark.parametrize("package", FILES)
def test_a_library_that_is_missing_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "find_spec", lambda _: None)
    name, content = FILES[package]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} needs {package}.*pip install {package}"):
        load_tokenizer(str(tmp_path), option="--teacher")


def test_a_class_that_fails_at_its_files_is_one_sentence(tmp_path: Path) -> None:
    tiny_gemma().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "T5Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"could not be loaded .*--teacher DIR"):
        load_tokenizer(str(tmp_path), option="--teacher")
