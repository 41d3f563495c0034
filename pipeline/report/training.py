"""Curves of trainings, several runs in one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from teacher_cache.pipeline.report.figures import Axis, Series, chart
from teacher_cache.pipeline.report.page import Cell, Figure, Figures, Folded, Part, Table
from teacher_cache.pipeline.report.words import CURVES, NONE, quantity, shown
from teacher_cache.stages.training.run_folder import (
    HELD_OUT,
    RunRecord,
    held_out_figures,
    is_clock,
)

# What stands in the Trainer's log and is no curve: where it is; the last is the mean of all steps.
NOT_CURVES = ("step", "epoch", "total_flos", "train_loss")
FEWEST_POINTS = 3  # fewer are no curve
MOST_VALUES = 25  # rows of a curve's table

Curve = tuple[tuple[int, float], ...]
"""(optimizer step, value)."""


def curves_of(log: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Curve]:
    """Curves by figure and by whether they are of `training` or `held out`.

    Args:
        log: entries of transformers' Trainer, each with its `step`; held-out figures begin with
            `eval_`.
    """
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            if is_clock(name) or name in NOT_CURVES or not isinstance(value, int | float):
                continue
            side = "held out" if name.startswith(HELD_OUT) else "training"
            curve = found.setdefault((name.removeprefix(HELD_OUT), side), [])
            curve.append((int(entry["step"]), float(value)))
    return {key: tuple(curve) for key, curve in found.items()}


def training_parts(records: Mapping[str, RunRecord]) -> Iterator[Part]:
    """What trainings took, and their curves: those first that say how good a model gets."""
    rows = [
        [
            Cell(name),
            Cell(f"{result['num_steps']:,}"),
            Cell(f"{result.get('best_step') or result['num_steps']:,}"),
            Cell(duration(result["seconds"])),
        ]
        for name, record in records.items()
        if (result := record.result or {}).get("num_steps") is not None
    ]
    if rows:
        yield Table(
            caption="What was trained",
            headings=["run", "steps", "kept from step", "time"],
            rows=rows,
        )
    curves = {
        (name, *key): curve
        for name, record in records.items()
        for key, curve in curves_of((record.result or {}).get("log", ())).items()
    }
    figures: dict[str, Figure] = {}
    for figure in dict.fromkeys(key[1] for key in curves):
        drawn = _figure(figure, list(records), curves)
        if drawn is not None:
            figures[figure] = drawn
    first = [figures[name] for name in CURVES if name in figures]
    others = [one for name, one in figures.items() if name not in CURVES]
    if first:
        yield Figures(of=first)
    if others:
        yield Folded(title=f"{len(others)} other curves", of=[Figures(of=others)])
    yield from _last(records)


def _figure(
    figure: str, names: Sequence[str], curves: Mapping[tuple[str, str, str], Curve]
) -> Figure | None:
    """The curves of one figure, a colour a run; None of points that are too few for any."""
    series, rows = [], []
    for i, name in enumerate(names):
        for side in ("training", "held out"):
            curve = curves.get((name, figure, side), ())
            finite = [point for point in curve if math.isfinite(point[1])]
            if len(finite) < FEWEST_POINTS:
                continue
            is_held_out = side == "held out"
            title = side if len(names) == 1 else f"{name}, {side}"
            series.append(
                Series(
                    name=title,
                    points=finite,
                    colour=i if len(names) > 1 else int(is_held_out),
                    is_marked=is_held_out,
                    dash=i if len(names) > 1 else int(is_held_out),
                )
            )
            kept = np.unique(np.linspace(0, len(curve) - 1, MOST_VALUES).astype(int))
            rows += [
                [Cell(title), Cell(f"{curve[k][0]:,}"), Cell(shown(figure, curve[k][1]))]
                for k in kept
            ]
    if not series:
        return None
    known = quantity(figure)
    caption = f"{known.words[0].upper()}{known.words[1:].removesuffix(', %')}, by optimizer step."
    return Figure(
        caption=caption,
        svg=chart(series, Axis(title="step"), Axis(title=known.words, is_percent=known.is_percent)),
        legend=series,
        values=Table(
            caption=f"{caption} At most {MOST_VALUES} steps of each, evenly spaced.",
            headings=["curve", "step", known.words],
            rows=rows,
        ),
    )


def _last(records: Mapping[str, RunRecord]) -> Iterator[Part]:
    """What each run measured last of what it held out."""
    found = {name: held_out_figures(record) for name, record in records.items()}
    columns = list(dict.fromkeys(figure for figures in found.values() for figure in figures))
    if columns:
        rows = [
            [
                Cell(name),
                *(Cell(shown(one, figures[one]) if one in figures else NONE) for one in columns),
            ]
            for name, figures in found.items()
            if figures
        ]
        yield Table(
            caption="Samples of the cache that were held out, as the training measured them last",
            headings=["run", *(quantity(one).words for one in columns)],
            rows=rows,
            is_stacked=True,
        )


def duration(seconds: float) -> str:
    """In the units that fit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
