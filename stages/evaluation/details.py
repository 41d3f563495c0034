"""What an evaluation says beyond its means: intervals, bins, and where models disagree.

Each figure is a mean over the positions at which a teacher spoke: one of a classifier's document,
many of a language model's. Which documents came is chance, so whole documents are drawn again:
95 % percentile intervals of a bootstrap over documents (Efron and Tibshirani 1993, chapter 13), of
models on the same draws, which makes a difference of two a paired one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

NUM_RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
MOST_DRAWN = 2**22  # counts of documents that are held at a time
NUM_DISAGREEMENTS = 10
# Upper edges: of the teacher's probability of what it finds most probable, and of tokens.
CONFIDENCE_EDGES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
LENGTH_EDGES = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, np.inf)

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One model at N positions.

    Attributes:
        document: [N] from 0, ascending or not; each of the D documents at least once.
        length: [N] tokens: of the position's document, or those that the model has read of it.
        confidence: [N] the teacher's probability of what it finds most probable; None where that
            is not known.
        figures: by name [N]; NaN where a position has none (no label, no teacher).
    """

    document: np.ndarray
    length: np.ndarray
    confidence: np.ndarray | None = None
    figures: Mapping[str, np.ndarray]

    @property
    def known(self) -> dict[str, np.ndarray]:
        """The figures that any position has."""
        return {name: one for name, one in self.figures.items() if not np.isnan(one).all()}


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Positions of a range.

    Attributes:
        low: the range's end that is not in it.
        high: the one that is; None where there is no bound.
        num: positions.
        means: of the figures that they have.
    """

    low: float
    high: float | None
    num: int
    means: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Where a student is far from its teacher.

    Attributes:
        text: of the document, or what stands before the position.
        truth: class or next token; None where that is not known.
        kl: from the teacher's distribution, nats.
        teacher: its first outcomes, with their probabilities.
        student: the same of the student's.
    """

    text: str
    truth: str | None
    kl: float
    teacher: Sequence[tuple[str, float]]
    student: Sequence[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class ModelDetails:
    """Of one model.

    Attributes:
        intervals: of its figures' means.
        by_confidence: positions by the teacher's confidence; empty without a teacher.
        by_length: positions by length.
        calibration: a classifier's labelled documents by its own confidence; figures `confidence`
            and `accuracy`.
        confusion: of a classifier, [C, C] counts, labels by row; None without labels.
        disagreements: of a student, the largest KL first, one of a document.
    """

    intervals: dict[str, Interval]
    by_confidence: Sequence[Bin] = ()
    by_length: Sequence[Bin] = ()
    calibration: Sequence[Bin] = ()
    confusion: Sequence[Sequence[int]] | None = None
    disagreements: Sequence[Disagreement] = ()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between two models on the same documents.

    Attributes:
        model: from whose mean the other's is taken.
        other: the other.
        figure: of which.
        mean: the difference.
        interval: of it.
    """

    model: str
    other: str
    figure: str
    mean: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Details:
    """Of an evaluation.

    Attributes:
        models: by name of the row.
        differences: of every two models on the same documents, the later row's from the earlier's.
        class_names: of a classifier's classes, in their order.
        num_resamples: of the bootstrap.
    """

    models: dict[str, ModelDetails]
    differences: Sequence[Difference] = ()
    class_names: Sequence[str] = field(default_factory=tuple)
    num_resamples: int = NUM_RESAMPLES


def intervals_of(models: Mapping[str, Judged]) -> tuple[dict[str, dict], list[Difference]]:
    """Intervals of each model's figures by model and figure, and of their differences."""
    intervals: dict[str, dict[str, Interval]] = {}
    differences: list[Difference] = []
    groups: list[list[str]] = []
    for name, one in models.items():  # those of the same positions have the same draws
        for group in groups:
            first = models[group[0]]
            if np.array_equal(first.document, one.document):
                group.append(name)
                break
        else:
            groups.append([name])
    for group in groups:
        keys = [(name, figure) for name in group for figure in models[name].known]
        columns = [models[name].figures[figure] for name, figure in keys]
        means, drawn = resampled_means(models[group[0]].document, columns)
        of = {key: (means[i], drawn[:, i]) for i, key in enumerate(keys)}
        for (name, figure), (_, draws) in of.items():
            intervals.setdefault(name, {})[figure] = _interval(draws)
        for (name, figure), (mean, draws) in of.items():
            for other in group[: group.index(name)]:
                if (other, figure) in of:
                    other_mean, other_draws = of[other, figure]
                    differences.append(
                        Difference(
                            model=name,
                            other=other,
                            figure=figure,
                            mean=float(mean - other_mean),
                            interval=_interval(draws - other_draws),
                        )
                    )
    return intervals, differences


def resampled_means(
    document: np.ndarray,
    columns: Sequence[np.ndarray],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Means over positions, [F], and the same of documents that are drawn again, [R, F].

    Args:
        document: [N] of each position, 0 to D - 1.
        columns: F of [N], NaN where a position does not count.
        num_resamples: R.
        seed: of the draws, which depend on it and D alone.

    Returns:
        Means, and those of the draws; NaN of a draw in which nothing counts.
    """
    num = int(document.max()) + 1
    parts = []
    for column in columns:
        counts = ~np.isnan(column)
        for values in (np.where(counts, column, 0.0), counts):
            parts.append(np.bincount(document, weights=values, minlength=num))
    sums = np.stack(parts, axis=1)  # [D, 2F]: totals and counts in turn
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, num_resamples, max(1, MOST_DRAWN // num)):
        size = min(max(1, MOST_DRAWN // num), num_resamples - start)
        chosen = rng.integers(0, num, (size, num)) + num * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * num).reshape(size, num)
        drawn.append(times @ sums)
    with np.errstate(invalid="ignore"):
        all_means = [(one[..., 0::2] / one[..., 1::2]) for one in (sums.sum(axis=0), *drawn)]
    return all_means[0], np.concatenate(all_means[1:])


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.nanpercentile(draws, PERCENTILES)
    return float(low), float(high)


def binned(by: np.ndarray, edges: Sequence[float], figures: Mapping[str, np.ndarray]) -> list[Bin]:
    """Means of figures over the positions of each range that has any.

    Args:
        by: [N] what the ranges are of, at least 0.
        edges: their upper ends, ascending; the last bounds all.
        figures: by name [N], NaN where a position does not count.
    """
    which = np.minimum(np.searchsorted(edges, by, side="left"), len(edges) - 1)
    found = []
    for i, high in enumerate(edges):
        chosen = which == i
        values = {name: one[chosen] for name, one in figures.items()}
        means = {
            name: float(np.nanmean(one)) for name, one in values.items() if not np.isnan(one).all()
        }
        if chosen.any():
            found.append(
                Bin(
                    low=float(edges[i - 1]) if i else 0.0,
                    high=float(high) if np.isfinite(high) else None,
                    num=int(chosen.sum()),
                    means=means,
                )
            )
    return found


def bins_of(one: Judged) -> dict[str, list[Bin]]:
    """A model's positions by the teacher's confidence and by length."""
    figures = one.known
    by_confidence = (
        [] if one.confidence is None else binned(one.confidence, CONFIDENCE_EDGES, figures)
    )
    return {
        "by_confidence": by_confidence,
        "by_length": binned(one.length, LENGTH_EDGES, figures),
    }


def first_outcomes(
    probabilities: np.ndarray, names: Sequence[str], *, most: int = 3
) -> list[tuple[str, float]]:
    """The most probable outcomes of [C], in falling order."""
    order = np.argsort(-probabilities, kind="stable")[:most]
    return [(names[int(i)], float(probabilities[i])) for i in order]


def largest_of_documents(
    kl: np.ndarray, document: np.ndarray, most: int = NUM_DISAGREEMENTS
) -> np.ndarray:
    """Positions of the largest KL, falling, at most one of a document."""
    order = np.argsort(-np.nan_to_num(kl, nan=-np.inf), kind="stable")
    _, first = np.unique(document[order], return_index=True)
    return order[np.sort(first)[:most]]
