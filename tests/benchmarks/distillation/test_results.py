"""Figures of rows, goals and tables, from predictions that are written down here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.distillation import tables
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.findings import Findings
from benchmarks.distillation.quality_goals import goals
from benchmarks.distillation.results import Answers, Result, majority_logits, results
from benchmarks.distillation.rows import Block, Row
from benchmarks.distillation.teachers import sureness

LABELS = np.array([0, 1] * 50)
MOVIES = np.repeat(np.arange(10), 10)


def logits(num_right: int, sure: float = 2.0) -> np.ndarray:
    """Right on the first reviews, as sure of the others and wrong."""
    choice = np.where(np.arange(len(LABELS)) < num_right, LABELS, 1 - LABELS)
    return np.where(np.arange(2) == choice[:, None], sure, 0.0)


def answers(name: str, *num_right: int, teacher: int = 80, **fields) -> Answers:
    block: Block = fields.pop("block", "main")
    kind = fields.pop("kind", "student")
    only = name.startswith("labels")
    row = Row(name=name, title=f"the {name}", block=block, kind=kind, is_baseline=only)
    return Answers(
        row=row,
        seeds=tuple(range(len(num_right))),
        logits=tuple(logits(num) for num in num_right),
        taught_by=logits(teacher),
        seconds=tuple(10.0 + idx for idx in range(len(num_right))),
        num_parameters=4_300_000,
        num_outside=400_000,
        settings={"lr": 0.002},
        **fields,
    )


def of(block: Block = "main") -> list[Result]:
    majority = answers("majority", 50, kind="majority", block=block)
    rows = [
        majority,
        answers("teacher", 80, kind="teacher", block=block),
        answers("labels", 64, 66, block=block),
        answers("labels-embeddings", 70, 74, block=block),
        answers("all", 78, 80, block=block),
        answers("views", 79, 79, block=block),
    ]
    return results(rows, LABELS, MOVIES, num_resamples=500)


def test_means_over_seeds() -> None:
    found = {one.key: one for one in of()}
    best = found["main/all"]
    assert [one["accuracy"] for one in best.each] == [0.78, 0.80]
    assert best.mean["accuracy"] == pytest.approx(0.79)
    assert best.mean["agreement"] == pytest.approx((0.98 + 1) / 2)
    assert best.each[1]["kl"] == 0 < best.each[0]["kl"]
    assert found["main/majority"].mean.keys() == {"accuracy", "f1"}


def test_differences_are_to_the_teacher_and_to_the_stronger_labels_only() -> None:
    found = {one.key: one for one in of()}
    best = found["main/all"]
    assert best.to_teacher.value == pytest.approx(-0.01)
    assert best.to_baseline is not None
    assert best.to_baseline.value == pytest.approx(0.79 - 0.72)
    assert best.of_teacher.value == pytest.approx(0.79 / 0.80)
    assert best.to_teacher.low <= best.to_teacher.value <= best.to_teacher.high
    alone = results([answers("all", 79)], LABELS, MOVIES, num_resamples=10)
    assert alone[0].to_baseline is None


def test_majority_is_of_what_was_learned_from() -> None:
    assert majority_logits([1, 0, 1], 2).tolist() == [[0, 1], [0, 1]]
    assert majority_logits([0, 0, 1], 1).tolist() == [[1, 0]]


def cost(teacher: float, student: float) -> Cost:
    return Cost(
        batch_size=32,
        num_reviews=64,
        ms_per_review={"teacher": teacher, "student": student},
        passes_s={"teacher": (teacher,), "student": (student,)},
    )


def test_goals_are_computed() -> None:
    found = goals([*of("long"), *of("scarce"), *of()], cost(12.0, 1.5), standard=True)
    best = next(one for one in of("long") if one.key == "long/views")
    margin = 100 * best.to_teacher.margin
    assert [goal.value for goal in found] == pytest.approx(
        [7.0, 8.0, 7.0, 100 * 0.79 / 0.8, margin, 7.0]
    )
    verdicts = ["met", "missed", "met", "missed", "met" if margin >= 0 else "missed", "met"]
    assert [goal.verdict for goal in found] == verdicts
    small = goals(of(), cost(12.0, 1.0), standard=False)
    assert [goal.verdict for goal in small] == ["other sizes", "other sizes"]
    without = goals([one for one in of() if one.key != "main/views"], None, standard=True)
    assert [goal.verdict for goal in without] == ["not measured", "not measured"]


def test_a_teacher_on_its_own_training_text() -> None:
    found = sureness("its labels", logits(90, sure=2.0), LABELS)
    assert (found.accuracy, found.num_texts) == (0.9, 100)
    assert found.confidence == pytest.approx(1 / (1 + np.exp(-2.0)))
    likely, unlikely = np.log(1 + np.exp(-2.0)), np.log(1 + np.exp(2.0))
    assert found.nll == pytest.approx(0.9 * likely + 0.1 * unlikely)


def findings() -> Findings:
    rows = [*of(), *of("scarce")]
    spent = cost(12.0, 1.5)
    return Findings(
        command="python -m benchmarks.quality --blocks main,scarce",
        machine={"cores": 2, "mambapy": None},
        settings={"trials": "as the validation movies chose them"},
        titles={"main": "all labels", "scarce": "few labels"},
        baseline="labels only",
        results=rows,
        sureness=[sureness("teacher of full, its labels", logits(90), LABELS)],
        inside=[],
        cost=spent,
        overlaps=[],
        goals=goals(rows, spent, standard=True),
    )


def test_tables_say_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    findings().show(Console(width=180))
    printed = capsys.readouterr().out
    for part in ("79.0 (78.0, 80.0)", "+7.0 (", "98.8 (", "4.30 M", "0.40 M", "lr 0.002", "8.0"):
        assert part in printed, part
    assert "…" not in printed, "a table is too wide"
    assert printed.count("missed") == 1 and "few labels" in printed


def test_results_are_written(tmp_path: Path) -> None:
    found = findings()
    found.write(tmp_path, "quality")
    written = json.loads((tmp_path / "quality.json").read_text())
    assert len(written["results"]) == 12 and len(written["goals"]) == 3
    best = next(one for one in written["results"] if one["key"] == "scarce/all")
    assert best["seconds"] == [10, 11] and len(best["each"]) == 2
    assert written["machine"]["cores"] == 2
    text = (tmp_path / "quality.md").read_text()
    lines = text.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| model | accuracy %")))
    assert {line.count("|") for line in lines[start : start + 7]} == {11}
    assert "(cores 2)" in text and "| the all | 79.0 (78.0, 80.0) |" in text


def test_trials_are_shown_with_the_chosen_one() -> None:
    trials = [
        {"settings": {"lr": lr}, "accuracy": lr, "nll": 1.0, "seconds": 5} for lr in (0.1, 0.2)
    ]
    grid = tables.trial_grid({"main/all": {"trials": trials, "chosen": {"lr": 0.2}}})
    assert grid.lines == (
        ("main/all", "lr 0.1", "10.0", "1.000", "5"),
        ("main/all *", "lr 0.2", "20.0", "1.000", "5"),
    )
