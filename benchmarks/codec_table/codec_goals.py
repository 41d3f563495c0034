"""What was published of these rows, as goals: an order, a tie and a ratio of angles; and our own.

Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870, the distillation term alone, 8B to
3B: a loss of 2.50 with the twelve most probable tokens renormalised, 2.40 with fifty, 2.37 with
none of the teacher, 2.35 with draws and 2.34 with all; gradients at 58 and at 4 degrees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.codec_table.kept import Kept
from benchmarks.codec_table.results import Difference, Result
from benchmarks.goal import Goal

TIE = 0.02  # nats; as published, and the rounding of two figures of two decimals
CLOSE = 0.005  # nats, of the optimal draws
PUBLISHED_ANGLES = 58.0, 4.0


def goals(found: Sequence[Result], kept: Mapping[str, Kept], *, standard: bool) -> list[Goal]:
    """All goals.

    Args:
        found: results of all rows that were run.
        kept: of the table's own teacher.
        standard: whether the run is of the scale that the goals were set for.
    """
    by_name = {one.name: one for one in found}

    def above(name: str, *, dense: bool = False) -> float | None:
        one = by_name.get(name)
        difference: Difference | None = None
        if one is not None:
            difference = one.to_dense if dense else one.to_baseline
        return None if difference is None else difference.mean

    def least(what: str, value: float | None, bound: float) -> Goal:
        return Goal(what, value, bound, at_least=True, applies=standard)

    naive, drawn, distinct = (kept.get(x) for x in ("naive-12", "sampled-50", "distinct-45"))
    halved = distinct.angles.step / drawn.angles.step if distinct and drawn else None
    ratio = naive.angles.all_steps / drawn.angles.all_steps if naive and drawn else None
    published = PUBLISHED_ANGLES[0] / PUBLISHED_ANGLES[1]
    return [
        least("top-12 renormalised: CE above none, nats", above("naive-12"), 0.0),
        least("top-50 renormalised: CE above none, nats", above("naive-50"), 0.0),
        Goal("dense: CE above none, nats", above("dense"), 0.0, applies=standard),
        Goal("50 draws: CE above none, nats", above("sampled-50"), 0.0, applies=standard),
        Goal(
            "50 draws: CE above dense, nats", above("sampled-50", dense=True), TIE, applies=standard
        ),
        Goal(
            "18 distinct ids: CE above dense, nats",
            above("distinct-18", dense=True),
            CLOSE,
            applies=standard,
        ),
        Goal(
            "angle of a step, 45 distinct ids over 50 draws of as many bytes",
            halved,
            0.5,
            applies=standard,
        ),
        least("angle to dense, top-12 renormalised over 50 draws", ratio, published),
    ]
