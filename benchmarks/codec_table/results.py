"""From students' figures to a table's: means over seeds, and differences with their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

from benchmarks.codec_table.held_out import Figures
from benchmarks.codec_table.rows import Row

COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between two rows' cross-entropies, seed by seed: same first weights, same order of text.

    Attributes:
        mean: nats, over the seeds.
        margin: half of the 95 % interval of Student's t; None of a single seed.
    """

    mean: float
    margin: float | None

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.margin is not None and abs(self.mean) <= self.margin


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row's students.

    Attributes:
        name: the row's.
        title: the row's.
        alpha: the row's.
        seeds: of its students.
        each: what each came to.
        mean: of each figure.
        spread: sample standard deviation of the cross-entropies over seeds; None of a single one.
        to_baseline: cross-entropy less that of the students of next tokens alone; None for these.
        to_dense: cross-entropy less that of the dense row of the same weights of its terms; None
            for that row.
    """

    name: str
    title: str
    alpha: float
    seeds: tuple[int, ...]
    each: tuple[Figures, ...]
    mean: Figures
    spread: float | None
    to_baseline: Difference | None
    to_dense: Difference | None


def result(
    row: Row,
    seeds: tuple[int, ...],
    figures: Mapping[str, Sequence[Figures]],
    *,
    baseline: str,
    dense: str,
) -> Result:
    """The figures of one row.

    Args:
        row: whose.
        seeds: of all rows' students.
        figures: by the rows' names, one a seed.
        baseline: name of the row of next tokens alone; it may be missing.
        dense: name of the dense row that it is compared with; it may be missing.
    """
    each = figures[row.name]
    ces = [one.ce for one in each]

    def to(other: str) -> Difference | None:
        if other == row.name or other not in figures:
            return None
        return difference(ces, [one.ce for one in figures[other]])

    return Result(
        name=row.name,
        title=row.title,
        alpha=row.alpha,
        seeds=seeds,
        each=tuple(each),
        mean=mean_figures(each),
        spread=statistics.stdev(ces) if len(ces) > 1 else None,
        to_baseline=to(baseline),
        to_dense=to(dense),
    )


def mean_figures(each: Sequence[Figures]) -> Figures:
    """Figure by figure."""
    return Figures(
        **{name: statistics.fmean(vars(one)[name] for one in each) for name in vars(each[0])}
    )


def difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """Of paired figures, one a seed."""
    found = [a - b for a, b in zip(one, other, strict=True)]
    num = len(found)
    if num == 1:
        return Difference(mean=found[0], margin=None)
    quantile = float(student_t.ppf((1 + COVERAGE) / 2, num - 1))
    margin = quantile * statistics.stdev(found) / math.sqrt(num)
    return Difference(mean=statistics.fmean(found), margin=margin)
