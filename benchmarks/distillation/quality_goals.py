"""The quality benchmark's goals, computed from what one run measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.distillation.cost import Cost
from benchmarks.distillation.results import Result
from benchmarks.distillation.rows import BLOCKS
from benchmarks.goal import Goal

MIN_OF_TEACHER = 99.0  # %
MIN_GAIN = 6.0  # points of accuracy
MIN_TIMES_CHEAPER = 10.0


def goals(found: Sequence[Result], cost: Cost | None, *, standard: bool) -> list[Goal]:
    """All goals.

    Args:
        found: results of all rows that were run.
        cost: of `teacher` and `student`, where it was measured.
        standard: whether the run is of the scale that the goals were set for.
    """
    by_key = {one.key: one for one in found}
    blocks = {one.block for one in found}

    def at_least(what: str, value: float | None, bound: float) -> Goal:
        return Goal(what, value, bound, at_least=True, applies=standard)

    def of_long() -> Iterator[Goal]:
        long = by_key.get("long/views")
        yield at_least(
            "with views, trained long, accuracy in % of the teacher's",
            100 * long.of_teacher.value if long else None,
            MIN_OF_TEACHER,
        )
        yield at_least(
            "with views, trained long, depth of 0 inside the interval of points above the teacher",
            100 * long.to_teacher.margin if long else None,
            0.0,
        )
        yield at_least("with views, trained long, points above labels only", _gain(long), MIN_GAIN)

    def of_main() -> Iterator[Goal]:
        views = by_key.get("main/views")
        yield at_least("with views, points above labels only", _gain(views), MIN_GAIN)
        yield at_least(
            "CPU time of a review, teacher over student",
            cost.ratio("teacher", "student") if cost else None,
            MIN_TIMES_CHEAPER,
        )

    def of_scarce() -> Iterator[Goal]:
        best = by_key.get("scarce/all")
        yield at_least("few labels: all of it, points above labels only", _gain(best), MIN_GAIN)

    goals_of = {"main": of_main, "scarce": of_scarce, "long": of_long}
    return [goal for block in BLOCKS if block in blocks for goal in goals_of[block]()]


def _gain(result: Result | None) -> float | None:
    if result is None or result.to_baseline is None:
        return None
    return 100 * result.to_baseline.value
