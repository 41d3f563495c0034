"""The scan benchmark's results, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from benchmarks.backbones import BACKBONES, BASELINE
from benchmarks.goal import Goal
from benchmarks.goals import FIT_FROM, last_length, memory_exponent, time_exponent
from benchmarks.timing import Cell, Shape, find

Cost = Callable[[Cell], float | None]


def time_table(cells: Sequence[Cell], names: Sequence[str], batch: int) -> Table:
    """Median seconds by shape and backbone, with ratios to the encoder and exponents."""
    table = _table("forward + backward, median; × the encoder's", names)
    _add_costs(table, cells, names, lambda cell: cell.median_s, _seconds)
    _add_exponents(table, cells, names, time_exponent, batch)
    return table


def memory_table(cells: Sequence[Cell], names: Sequence[str], batch: int) -> Table:
    """Peak memory above the loaded model, by shape and backbone, in the same form."""
    table = _table("peak memory above the model and its gradients; × the encoder's", names)
    _add_costs(table, cells, names, lambda cell: cell.peak_bytes, _megabytes)
    _add_exponents(table, cells, names, memory_exponent, batch)
    return table


def as_json(
    machine: dict[str, Any],
    settings: dict[str, Any],
    cells: Sequence[Cell],
    names: Sequence[str],
    found: Sequence[Goal],
    batch: int,
) -> dict[str, Any]:
    """Everything that the tables show, and each single time."""
    return {
        "machine": machine,
        "settings": settings,
        "backbones": {name: BACKBONES[name].about for name in names},
        "cells": [asdict(cell) | {"median_s": cell.median_s} for cell in cells],
        "exponents": {
            name: {
                "time": time_exponent(cells, name, batch),
                "memory": memory_exponent(cells, name, batch),
            }
            for name in names
        },
        "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in found],
    }


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table("batch × length", title=title, title_justify="left", show_lines=True)
    for name in names:
        table.add_column(BACKBONES[name].title, justify="right")
    return table


def _add_costs(
    table: Table,
    cells: Sequence[Cell],
    names: Sequence[str],
    cost: Cost,
    written: Callable[[float], str],
) -> None:
    for shape in sorted({cell.shape for cell in cells}):
        table.add_row(str(shape), *(_written(cells, name, shape, cost, written) for name in names))


def _written(
    cells: Sequence[Cell],
    name: str,
    shape: Shape,
    cost: Cost,
    written: Callable[[float], str],
) -> str:
    cell, baseline = find(cells, name, shape), find(cells, BASELINE, shape)
    if cell is None or cell.not_run:
        return "not run"
    value = cost(cell)
    if value is None:
        return "not measured"
    unit = None if baseline is None else cost(baseline)
    return f"{written(value)}\n{value / unit:.2f}×" if unit else written(value)


def _add_exponents(
    table: Table,
    cells: Sequence[Cell],
    names: Sequence[str],
    fitted: Callable[[Sequence[Cell], str, int], float | None],
    batch: int,
) -> None:
    written: list[str] = []
    for name in names:
        exponent = fitted(cells, name, batch)
        last = last_length(cells, name, batch)
        written.append("" if exponent is None else f"{exponent:.2f}\nto {last:,}")
    table.add_row(f"exponent from\n{batch} × {FIT_FROM:,}", *written)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.2f} s"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
