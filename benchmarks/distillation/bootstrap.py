"""Confidence intervals of accuracies by a paired bootstrap over movies.

Reviews of one movie are not independent, so movies are drawn, with all their reviews
(a cluster bootstrap: Davison and Hinkley 1997, section 3.8). Every row is judged on the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval.

    Attributes:
        value: on the reviews as they are.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """How far 0 lies from the nearer end; negative where it lies outside."""
        return min(self.high, -self.low)


class MovieBootstrap:
    """Draws of movies, made once, that all rows share.

    Args:
        movie_idx: [N] the movie of each review, 0 to M - 1, each at least once.
        num_resamples: R.
        seed: of the draws.
    """

    def __init__(self, movie_idx: NDArray[np.integer], num_resamples: int, seed: int = SEED):
        self._movie_idx = movie_idx
        self._num_reviews = np.bincount(movie_idx).astype(np.float64)  # [M]
        num_movies = len(self._num_reviews)
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, num_movies, (num_resamples, num_movies))  # [R, M]
        flat = drawn + num_movies * np.arange(num_resamples)[:, None]
        times = np.bincount(flat.ravel(), minlength=num_resamples * num_movies)
        # How often each draw holds each movie.
        self._times = times.reshape(num_resamples, num_movies).astype(np.float64)  # [R, M]

    def accuracies(self, correct: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The accuracy within each draw, mean over seeds.

        Args:
            correct: [S, N] whether each seed's student is right about each review.

        Returns:
            [R].
        """
        share = correct.mean(axis=0)  # [N]; the seeds share their reviews, so means commute
        per_movie = np.bincount(self._movie_idx, weights=share)  # [M]
        return (self._times @ per_movie) / (self._times @ self._num_reviews)

    def difference(self, correct: NDArray[np.bool_], other: NDArray[np.bool_]) -> Interval:
        """Accuracy of one minus that of another; both [S, N], their seeds may differ in number."""
        found = self.accuracies(correct) - self.accuracies(other)
        return _interval(float(correct.mean() - other.mean()), found)

    def ratio(self, correct: NDArray[np.bool_], other: NDArray[np.bool_]) -> Interval:
        """Accuracy of one over that of another."""
        found = self.accuracies(correct) / self.accuracies(other)
        return _interval(float(correct.mean() / other.mean()), found)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
