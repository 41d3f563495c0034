"""Other kinds of heads as a user types them: a teacher made, cached, learned from, asked."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.headed import write_labeled

SHORT = ("--max-length", "16", "--device", "cpu")
MULTI, NUMBER = "multi_label_classification", "regression"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tuned(data: str, base: Path, *options: str) -> str:
    return done(
        "finetune-teacher", "--data", data, "--model", base, "--out", "teacher", "--max-steps", "2",
        *SHORT, *options,
    )  # fmt: skip


def trained() -> None:
    done("train-student", "--cache", "cache", "--out", "run", "--device", "cpu", *TINY_STUDENT)


def test_labels_as_lists_from_teacher_to_answer(tiny_bert: Path) -> None:
    write_labeled(Path("data.jsonl"), MULTI, num=60)
    assert "held-out micro F1" in tuned("data.jsonl", tiny_bert)
    assert json.loads(Path("teacher/config.json").read_text())["problem_type"] == MULTI
    said = done(
        "cache-teacher", "--data", "data.jsonl", "--teacher", "teacher", "--out", "cache", *SHORT
    )
    assert "teacher against 60 labelled documents: micro F1 " in said
    trained()
    shown = done("evaluate", "run", "--data", "data.jsonl", "--device", "cpu",
                 "--latency-lengths", "8", "--threshold", "0.3")  # fmt: skip
    assert "macro F1 %" in shown and "exact %" in shown
    answer = done("predict", "run", "A film.", "--device", "cpu", "--threshold", "0.01")
    names, probabilities, text = answer.rstrip("\n").split("\t")
    assert {*names.split(",")} == {"fresh", "funny", "long"}
    assert len(probabilities.split(",")) == 3 and text == "A film."
    assert "p 0." in done("inspect", "cache")
    refused("export", "run", "page.html", "--to", "html", saying="is a multi-label classifier")
    done("report", "run")


def test_labels_as_columns(tiny_bert: Path) -> None:
    write_labeled(Path("data.jsonl"), MULTI, num=60)
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    with open("data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "fresh", "funny", "long"])
        for row in rows:
            has = [int(name in row["label"]) for name in ("fresh", "funny", "long")]
            writer.writerow([row["text"], *has])
    columns = ("--label-column", "fresh,funny,long")
    tuned("data.csv", tiny_bert, *columns)
    command = ("cache-teacher", "--data", "data.csv", "--teacher", "teacher", *SHORT)
    done(*command, *columns, "--out", "cache")
    refused(*command, "--label-column", "fresh,funny", saying="label 'long', of which none of the")
    refused(*command, "--label-column", "fresh,funy", saying="there is no column 'funy'")
    refused(*command, "--label-column", "fresh,fresh", saying="names the column 'fresh' twice")
    single = ("cache-teacher", "--data", "data.csv", "--teacher", tiny_bert, *SHORT)
    refused(*single, *columns, saying="the labels fresh, funny, long of the corpus are none of")


def test_numbers_from_teacher_to_answer(tiny_bert: Path) -> None:
    write_labeled(Path("data.jsonl"), NUMBER, num=60)
    assert "held-out mean squared error" in tuned("data.jsonl", tiny_bert)
    assert json.loads(Path("teacher/config.json").read_text())["problem_type"] == NUMBER
    command = ("cache-teacher", "--data", "data.jsonl", "--teacher", "teacher", *SHORT)
    assert "labelled documents: MSE " in done(*command, "--out", "cache")
    refused(*command, "--label-map", "a=0", saying="--label-map is of classes, and this teacher")
    trained()
    shown = done("evaluate", "run", "--data", "data.jsonl", "--device", "cpu",
                 "--latency-lengths", "8")  # fmt: skip
    assert "Pearson" in shown and "Spearman" in shown
    number, text = done("predict", "run", "A film.", "--device", "cpu").rstrip("\n").split("\t")
    assert text == "A film." and float(number) == pytest.approx(float(number))
    refused("predict", "run", "a", "--threshold", "0.3", saying="is of multi-label classifiers")
    refused("export", "run", "page.html", "--to", "html", saying="is a regression model")
    done("report", "run")


def test_integers_may_be_numbers(tiny_bert: Path) -> None:
    rows = [{"text": f"film {i} of many", "label": i % 5} for i in range(40)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tuned("data.jsonl", tiny_bert, "--problem-type", NUMBER)
    assert json.loads(Path("teacher/config.json").read_text())["problem_type"] == NUMBER


def test_one_output_without_a_problem_type_is_said_to_be_a_number(tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=1, id2label={0: "LABEL_0"}, ignore_mismatched_sizes=True
    )
    model.config.problem_type = None
    model.save_pretrained("teacher")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained("teacher")
    write_labeled(Path("data.jsonl"), NUMBER, num=20)
    outcome = pipe("cache-teacher", "--data", "data.jsonl", "--teacher", "teacher", *SHORT)
    assert outcome.code == 0
    assert "it is read as a number" in " ".join(outcome.stderr.split())
