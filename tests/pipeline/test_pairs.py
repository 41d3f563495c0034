"""Pairs as a user types them: the presets on stand-ins of GLUE's columns, and one's own files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.pipeline import presets
from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.stand_ins import GLUE, write_glue
from tests.tiny_models import write_tiny_bert

SHORT = ("--max-length", "24", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["mnli", "qnli"])
def test_a_preset_from_cache_to_prediction(
    name: str,
    tmp_path: Path,
    bert_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On local files of the real data set's columns, splits and classes."""
    preset = presets.PRESETS[name]
    assert (tuple(str(preset.text_column).split(",")), preset.source) == (
        GLUE[name][0],
        f"nyu-mll/glue:{name}",
    )
    source = write_glue(tmp_path / "glue" / name, name)
    assert preset.label_names is not None
    # A teacher of placeholders (textattack's) has its classes in GLUE's order.
    classes = dict(enumerate(preset.label_names))
    teacher = write_tiny_bert(tmp_path / "teacher", bert_tokenizer, classes=classes)
    local = replace(preset, source=str(source), teacher=str(teacher))
    monkeypatch.setitem(presets.PRESETS, name, local)
    said = pipe("cache-teacher", "--data", name, "--out", "cache", *SHORT)
    assert said.code == 0 and "pairs of" in " ".join(said.stderr.split())
    done("train-student", "--cache", "cache", "--out", "run", "--device", "cpu", *TINY_STUDENT)
    printed = done("evaluate", "run", "--data", name, "--device", "cpu", "--latency-lengths", "8")
    assert "24 held-out documents" in printed
    answer = done("predict", "run", "Is it warm?", "--second", "It is.", "--device", "cpu")
    label, probability, *texts = answer.rstrip("\n").split("\t")
    assert label in preset.label_names and 0 < float(probability) < 1
    assert texts == ["Is it warm?", "It is."]
    line = done("predict", "run", "--device", "cpu", text="Is it warm?\tIt is.\n")
    assert line == answer
    shown = done("inspect", "cache")
    assert "pair: [CLS] " in shown and shown.count("[SEP]") >= 4
    refused("export", "run", "page.html", "--to", "html", saying="the page has room for one text")


def test_columns_that_look_like_a_pair_are_named_with_what_to_type(
    tmp_path: Path, tiny_bert: Path
) -> None:
    rows = [{"question": "Good?", "text": f"film {i}", "label": i % 2} for i in range(8)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("cache-teacher", "--data", "pairs.jsonl", "--teacher", tiny_bert, *SHORT)
    refused(*command, saying="read both with --text-column question,text, or 'text' alone")
    done(*command, "--text-column", "question,text")


def test_a_second_text_is_of_pairs(tiny_cache: Path) -> None:
    done("train-student", "--cache", tiny_cache, "--out", "run", "--device", "cpu", *TINY_STUDENT)
    refused("predict", "run", "a", "--second", "b", saying="run reads single texts: leave it out")


def test_a_language_model_reads_no_pairs() -> None:
    Path("pairs.jsonl").write_text(json.dumps({"question": "Good?", "text": "It is."}))
    refused(
        "cache-teacher", "--task", "lm", "--data", "pairs.jsonl", "--teacher", ".",
        "--text-column", "question,text", saying="a pair of texts, which classifiers read",
    )  # fmt: skip
