"""Curves of a training's log, and what takes their place where they are none."""

from __future__ import annotations

from teacher_cache.pipeline.report.page import Figures, Folded, Table
from teacher_cache.pipeline.report.training import curves_of, duration, training_parts
from teacher_cache.stages.training.run_folder import RunRecord

LOG = [
    {"step": 5, "epoch": 0.1, "kd": 0.9, "loss": 2.0, "learning_rate": 0.1},
    {"step": 10, "epoch": 0.2, "kd": 0.8, "loss": 1.0, "learning_rate": 0.2, "note": "x"},
    {"step": 10, "eval_loss": 1.5, "eval_f1": 0.5, "eval_runtime": 3.0, "eval_steps_per_second": 1},
    {"step": 15, "loss": 0.5, "learning_rate": 0.2},
    {"step": 15, "train_loss": 1.5, "total_flos": 0.0, "train_runtime": 9.0},
]


def record(**changes: object) -> RunRecord:
    result = {"num_steps": 15, "seconds": 100.0, "log": LOG, **changes}
    return RunRecord(settings={}, about={}, complete=True, result=result)


def test_each_figure_has_a_curve_of_each_side() -> None:
    found = curves_of(LOG)
    assert found["loss", "training"] == ((5, 2.0), (10, 1.0), (15, 0.5))
    assert found["loss", "held out"] == ((10, 1.5),)
    assert {name for name, _ in found} == {"kd", "loss", "learning_rate", "f1"}
    assert curves_of([]) == {} == curves_of(LOG[4:])


def test_two_points_are_no_picture() -> None:
    parts = list(training_parts({"a": record(), "b": record()}))
    (shown,) = [one for one in parts if isinstance(one, Figures)]
    (loss,) = shown.of
    assert [one.name for one in loss.legend] == ["a, training", "b, training"]
    assert len({(one.colour, one.dash) for one in loss.legend}) == 2
    (folded,) = [one for one in parts if isinstance(one, Folded)]
    (rates,) = folded.of
    assert isinstance(rates, Figures)
    assert [one.caption for one in rates.of] == ["Learning rate, by optimizer step."]
    assert [row[2].text for row in loss.values.rows] == ["2.000", "1.000", "0.500"] * 2


def test_what_was_held_out_is_a_table() -> None:
    evaluation = {"step": 10, "eval_f1": 0.5, "eval_loss": 1.5, "eval_runtime": 3.0}
    runs = {"a": record(evaluation=evaluation), "b": record()}
    *_, last = training_parts(runs)
    assert isinstance(last, Table)
    assert list(last.headings) == ["run", "F1, %", "loss"]
    assert [[cell.text for cell in row] for row in last.rows] == [["a", "50.0", "1.500"]]


def test_durations() -> None:
    assert [duration(one) for one in (5, 120, 7200)] == ["5 s", "2 min", "2.0 h"]
