"""The scan benchmark's goals, computed from what one run measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.backbones import BACKBONES, BASELINE
from benchmarks.goal import Goal
from benchmarks.timing import Cell, Shape, by_length, find, growth_exponent

# Below it each operation's fixed cost weighs more than the positions, and a line fitted through
# those lengths would promise a growth that longer ones do not keep.
FIT_FROM = 1024
MAX_EXPONENT = 1.05
# What the goals were set for, on a CPU; elsewhere they say nothing.
WIDTH, LAYERS, SHAPE, FIT_TO = 256, 4, Shape(512, 8), 8192


def time_exponent(cells: Sequence[Cell], backbone: str, batch: int) -> float | None:
    """Growth of the time with the length from 1,024, or none."""
    times = by_length(cells, backbone, batch, lambda cell: cell.median_s)
    return growth_exponent(times, from_length=FIT_FROM)


def memory_exponent(cells: Sequence[Cell], backbone: str, batch: int) -> float | None:
    """Growth of the peak memory with the length from 1,024, or none."""
    peaks = by_length(cells, backbone, batch, lambda cell: cell.peak_bytes)
    return growth_exponent(peaks, from_length=FIT_FROM)


def time_ratio(cells: Sequence[Cell], backbone: str, other: str, shape: Shape) -> float | None:
    """Median time of one backbone over another's at a shape, or none."""
    pair = [find(cells, name, shape) for name in (backbone, other)]
    above, below = (cell.median_s if cell else None for cell in pair)
    return above / below if above and below else None


def goals(cells: Sequence[Cell], shape: Shape, batch: int, *, standard: bool) -> list[Goal]:
    """All goals.

    Args:
        cells: of one run.
        shape: that the ratios are taken at.
        batch: that the exponents are taken at.
        standard: whether width, layers and device are those of the goals.
    """
    found: list[Goal] = []
    for name, other, bound in (
        ("mamba", BASELINE, 5.0),
        ("mamba2", BASELINE, 2.0),
        ("hf-mambapy", "mamba", 5.0),
    ):
        what = f"{BACKBONES[name].title} / {BACKBONES[other].title}, time at {shape}"
        ratio = time_ratio(cells, name, other, shape)
        applies = standard and shape == SHAPE
        found.append(Goal(what, ratio, bound, at_least=other != BASELINE, applies=applies))
    for name in ("mamba", "mamba2"):
        for cost, fitted in (("time", time_exponent), ("memory", memory_exponent)):
            exponent = fitted(cells, name, batch)
            last = last_length(cells, name, batch)
            reach = f"from {FIT_FROM:,}" + (f" to {last:,}" if exponent is not None else "")
            what = f"{BACKBONES[name].title}, exponent of {cost} {reach}"
            applies = standard and last == FIT_TO
            found.append(Goal(what, exponent, MAX_EXPONENT, applies=applies))
    return found


def last_length(cells: Sequence[Cell], backbone: str, batch: int) -> int:
    """The longest length measured at a batch; 0 where there is none."""
    return max(by_length(cells, backbone, batch, lambda cell: cell.median_s), default=0)
