"""Curves of a training's log."""

from __future__ import annotations

import numpy as np

from teacher_cache.pipeline.pictures import curves_figure, curves_of, rendered

LOG = [
    {"step": 5, "epoch": 0.1, "kd": 0.9, "loss": 2.0, "learning_rate": 0.1},
    {"step": 10, "epoch": 0.2, "kd": 0.8, "loss": 1.0, "learning_rate": 0.2, "note": "x"},
    {"step": 10, "eval_loss": 1.5, "eval_f1": 0.5, "eval_runtime": 3.0, "eval_steps_per_second": 1},
    {"step": 10, "train_loss": 1.5, "total_flos": 0.0, "train_runtime": 9.0},
]


def test_each_figure_has_a_panel_and_held_out_values_share_it() -> None:
    found = curves_of(LOG)
    assert list(found) == ["loss", "kd", "learning_rate", "f1"], "the loss first"
    assert found["loss"] == {"training": ((5, 2.0), (10, 1.0)), "held out": ((10, 1.5),)}
    assert found["f1"] == {"held out": ((10, 0.5),)}


def test_the_figure_has_the_curves_points() -> None:
    figure = curves_figure(curves_of(LOG))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["loss", "kd", "learning rate", "f1"]
    lines = {line.get_label(): line for line in shown[0].get_lines()}
    assert np.array_equal(lines["training"].get_xydata(), [[5, 2], [10, 1]])
    assert lines["held out"].get_marker() == "o", "one point would be no line"
    assert b"<svg" in rendered(figure, "svg")


def test_nothing_logged() -> None:
    assert curves_of([]) == {} == curves_of(LOG[3:])
