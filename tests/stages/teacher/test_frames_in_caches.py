"""What stands around the pieces of a cache's documents, and what is cut of a longer vocabulary."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.teacher import language_modeling
from teacher_cache.stages.tokens.tokenizers import save_tokenizer
from tests.tiny_models import write_tiny_language_model
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace

TEXTS = ["def x x\n    x x\n\n\tx " * 4, "<bos>x", "def"]


def config_of(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    teacher = folder / "teacher"
    if not teacher.exists():
        write_tiny_language_model(teacher, tokenizer)
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in TEXTS))
    values: dict[str, Any] = {
        "task": "lm",
        "name": "texts",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": 8,
        "top_k": 4,
        "labeled": CorpusConfig(source=str(folder / "texts.jsonl"), labeled=False),
        "out": folder / "cache",
    }
    return CacheTeacherConfig.of(**(values | changes))


def samples_of(cache: Path) -> list[Any]:
    reader = CacheReader(cache)
    return [reader.sample(idx) for idx in range(len(reader))]


def test_every_piece_begins_and_the_cache_says_which_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = samples_of(cache_teacher.run(config_of(tmp_path, tiny_gemma())).cache)
    for sample in samples:
        for segment in np.unique(sample["segment"]):
            piece = sample["input_ids"][sample["segment"] == segment].tolist()
            assert piece[0] == 2 and piece.count(2) == 1
    assert sum(bool(sample["continues"]) for sample in samples) > 2
    assert "put before each piece of a document: <bos>; behind its end: <eos>" in caplog.text
    assert "1 of 3 documents of this shard begin with the begin-of-text token" in caplog.text


def test_a_begin_token_that_is_put_nowhere_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = tiny_gemma()
    tokenizer.backend_tokenizer.post_processor = None
    cache_teacher.run(config_of(tmp_path, tokenizer))
    assert "has the begin token <bos> and puts it nowhere" in caplog.text


def test_a_space_that_no_token_tells_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, tiny_metaspace())
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": " a b"}))
    cache_teacher.run(config)
    assert "1 of 1 documents of this shard have a space, at the beginning or behind" in caplog.text


def test_a_cache_of_an_earlier_release_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, tiny_gemma())
    with monkeypatch.context() as earlier:
        earlier.setattr(language_modeling, "packing_version", lambda _: 1)
        began = cache_teacher.run(config)
    assert "continues" not in samples_of(began.cache)[0]
    (began.cache / "labeled" / "000" / "000000.json").unlink()
    again = cache_teacher.run(config)
    assert again.manifest.fingerprint == began.manifest.fingerprint
    assert again.num_shards_run == 1
    anew = cache_teacher.run(config_of(tmp_path, tiny_gemma(), overwrite=True))
    assert anew.manifest.settings["packing"]["version"] == 2


def test_a_longer_vocabulary_is_cut_where_the_students_is_its_beginning(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    longer = copy.deepcopy(gpt2_tokenizer)
    longer.add_tokens(["<table>"], special_tokens=True)
    student = tmp_path / "student"
    student.mkdir()
    save_tokenizer(student, gpt2_tokenizer)
    cut: dict[str, Any] = {"student_tokenizer": str(student), "align": "truncate"}
    config = config_of(tmp_path, longer, **cut)
    manifest = cache_teacher.run(config).manifest
    assert manifest.settings["support"]["size"] == len(gpt2_tokenizer)
    TEXTS.append("a <table> of")
    try:
        with pytest.raises(CheckFailed, match=r"holds id 50,257, .* end at 50,257"):
            cache_teacher.run(config_of(tmp_path, longer, **cut, out=tmp_path / "other"))
    finally:
        TEXTS.pop()
