"""What the benchmarks have in common: interleaved repeats, time budgets, growth exponents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Shape:
    """The size of a batch of token ids; ordered by length.

    Attributes:
        length: tokens in a sequence.
        batch: sequences.
    """

    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.batch} × {self.length:,}"


@dataclass(frozen=True)
class Cell:
    """What was measured of one backbone at one shape.

    Attributes:
        backbone: its key.
        shape: of the batch.
        times_s: of each timed run; empty where nothing ran.
        peak_bytes: most memory above that of the loaded model, or none where not measured.
        not_run: why nothing ran, or none.
    """

    backbone: str
    shape: Shape
    times_s: tuple[float, ...] = ()
    peak_bytes: int | None = None
    not_run: str | None = None

    @property
    def median_s(self) -> float | None:
        """The median run, or none where nothing ran."""
        return statistics.median(self.times_s) if self.times_s else None


def interleaved(
    runs: Mapping[str, Callable[[], float]], repeats: Mapping[str, int]
) -> dict[str, tuple[float, ...]]:
    """Run everything once, then everything again: what disturbs the machine disturbs all alike.

    Args:
        runs: each runs once and returns its seconds.
        repeats: how often, by the same names; whoever is done drops out of later rounds.

    Returns:
        The seconds of each run, in order.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_idx in range(max(repeats.values(), default=0)):
        for name, run in runs.items():
            if round_idx < repeats[name]:
                times[name].append(run())
    return {name: tuple(measured) for name, measured in times.items()}


def affordable_repeats(run_s: float, left_s: float, most: int) -> int:
    """How many timed runs a budget allows.

    The first may take all that is left; all together may not take more than half of it if they
    are several, so that longer sequences are measured too.

    Args:
        run_s: of one run, as far as known.
        left_s: of the budget.
        most: repeats asked for.

    Returns:
        0 (it does not fit) to `most`.
    """
    if run_s > left_s:
        return 0
    if run_s == 0:
        return most
    return min(most, max(1, int(left_s / 2 / run_s)))


def predicted(measured: Mapping[Shape, float], shape: Shape) -> float:
    """Extrapolate a cost, seconds or bytes, to another shape of the same backbone.

    In proportion to the batch where the length was measured; else along the line, in logarithms,
    through the two longest at this batch, taken to be at least linear. 0 where nothing is known.
    """
    for known in measured:
        if known.length == shape.length:
            return measured[known] * shape.batch / known.batch
    shorter = sorted(known for known in measured if known.batch == shape.batch)
    if not shorter:
        return 0.0
    last, exponent = shorter[-1], 1.0
    if len(shorter) > 1:
        two = {known.length: measured[known] for known in shorter[-2:]}
        exponent = max(1.0, growth_exponent(two) or 1.0)
    return measured[last] * (shape.length / last.length) ** exponent


def growth_exponent(costs: Mapping[int, float], *, from_length: int = 1) -> float | None:
    """The p of `cost ~ length^p`: least squares in logarithms.

    Args:
        costs: by length; those that are not positive are left out.
        from_length: shorter ones are left out too.

    Returns:
        The slope, or none for fewer than two lengths.
    """
    points = [
        (math.log(length), math.log(cost))
        for length, cost in costs.items()
        if length >= from_length and cost > 0
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def by_length(
    cells: Iterable[Cell], backbone: str, batch: int, cost: Callable[[Cell], float | None]
) -> dict[int, float]:
    """One backbone's costs at one batch, by length, where they were measured."""
    found: dict[int, float] = {}
    for cell in cells:
        if cell.backbone == backbone and cell.shape.batch == batch:
            value = cost(cell)
            if value is not None:
                found[cell.shape.length] = value
    return found


def find(cells: Sequence[Cell], backbone: str, shape: Shape) -> Cell | None:
    """The cell of a backbone at a shape, if there is one."""
    return next((c for c in cells if c.backbone == backbone and c.shape == shape), None)
