"""From predictions to figures: each row's quality, and how it compares with others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.distillation.bootstrap import Interval, MovieBootstrap
from benchmarks.distillation.rows import Row
from teacher_cache.stages.training.measures import agreement_metrics, classification_metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a row's models say of the held-out reviews.

    Attributes:
        row: whose.
        seeds: of its models, in order; a row without seeds has seed 0.
        logits: of each seed, [N, C]; the majority's are one-hot.
        taught_by: [N, C] logits of the teacher that it is compared with; the majority has none.
        seconds: of each seed's training.
        num_parameters: embeddings included, none for the majority.
        num_outside: outside the token embedding.
        settings: that the trial chosen by tuning added.
    """

    row: Row
    seeds: tuple[int, ...]
    logits: tuple[np.ndarray, ...]
    taught_by: np.ndarray
    seconds: tuple[float, ...] = ()
    num_parameters: int | None = None
    num_outside: int | None = None
    settings: Mapping[str, object] | None = None

    def correct(self, labels: np.ndarray) -> np.ndarray:
        """[S, N] whether each seed's model is right about each review."""
        return np.stack([logits.argmax(axis=1) == labels for logits in self.logits])


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row's figures.

    Attributes:
        key: the row's.
        title: the row's.
        block: the row's.
        seeds: of its models.
        each: the figures of each seed, by name.
        mean: of the seeds, by name.
        seconds: of each seed's training.
        num_parameters: embeddings included, none for the majority.
        num_outside: outside the token embedding.
        settings: that the trial chosen by tuning added.
        to_teacher: accuracy minus the teacher's.
        to_baseline: accuracy minus that of the block's strongest baseline, where there is one.
        of_teacher: accuracy over the teacher's.
    """

    key: str
    title: str
    block: str
    seeds: tuple[int, ...]
    each: tuple[dict[str, float], ...]
    mean: dict[str, float]
    seconds: tuple[float, ...]
    num_parameters: int | None
    num_outside: int | None
    settings: Mapping[str, object] | None
    to_teacher: Interval
    to_baseline: Interval | None
    of_teacher: Interval


def figures(logits: np.ndarray, labels: np.ndarray, taught_by: np.ndarray) -> dict[str, float]:
    """Accuracy, f1, ece, nll, agreement and kl of one model."""
    return classification_metrics(logits, labels) | agreement_metrics(logits, taught_by)


def majority_logits(labels: Sequence[int] | np.ndarray, num: int) -> np.ndarray:
    """[num, C] for the most frequent of the labels that were learned from."""
    counts = np.bincount(labels)
    return np.tile(np.where(np.arange(len(counts)) == counts.argmax(), 1.0, 0.0), (num, 1))


def results(
    answers: Sequence[Answers], labels: np.ndarray, movie_idx: np.ndarray, num_resamples: int
) -> list[Result]:
    """The figures of one block's rows.

    Args:
        answers: of each row.
        labels: [N] class ids.
        movie_idx: [N] the movie of each review.
        num_resamples: of the bootstrap.
    """
    bootstrap = MovieBootstrap(movie_idx, num_resamples)
    baseline = _strongest_baseline(answers, labels)
    return [_result(one, baseline, labels, bootstrap) for one in answers]


def _strongest_baseline(answers: Sequence[Answers], labels: np.ndarray) -> np.ndarray | None:
    """[S, N] of the baseline that is the best on these very reviews."""
    found = [one.correct(labels) for one in answers if one.row.is_baseline]
    return max(found, key=lambda correct: correct.mean(), default=None)


def _result(
    answers: Answers, baseline: np.ndarray | None, labels: np.ndarray, bootstrap: MovieBootstrap
) -> Result:
    row, correct = answers.row, answers.correct(labels)
    teacher = answers.taught_by.argmax(axis=1)[None] == labels
    each = [figures(logits, labels, answers.taught_by) for logits in answers.logits]
    if row.kind == "majority":
        # It has no probabilities: what follows from its one-hot logits says nothing.
        each = [{name: one[name] for name in ("accuracy", "f1")} for one in each]
    return Result(
        key=row.key,
        title=row.title,
        block=row.block,
        seeds=answers.seeds,
        each=tuple(each),
        mean={name: statistics.fmean(one[name] for one in each) for name in each[0]},
        seconds=answers.seconds,
        num_parameters=answers.num_parameters,
        num_outside=answers.num_outside,
        settings=answers.settings,
        to_teacher=bootstrap.difference(correct, teacher),
        to_baseline=None if baseline is None else bootstrap.difference(correct, baseline),
        of_teacher=bootstrap.ratio(correct, teacher),
    )
