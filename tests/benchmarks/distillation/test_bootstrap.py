from __future__ import annotations

import numpy as np
import pytest

from benchmarks.distillation.bootstrap import Interval, MovieBootstrap

NUM_MOVIES, NUM_REVIEWS, NUM_RESAMPLES = 7, 60, 300


@pytest.fixture
def movie_idx() -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.concatenate([np.arange(NUM_MOVIES), rng.integers(0, NUM_MOVIES, NUM_REVIEWS - 7)])


def right(seed: int, num_seeds: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random((num_seeds, NUM_REVIEWS)) < share


def drawn_movies(num_resamples: int, num_movies: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_movies, (num_resamples, num_movies))


def slow_accuracies(correct: np.ndarray, movie_idx: np.ndarray) -> list[float]:
    """Each draw's reviews written out, each seed's accuracy on them, the mean over seeds."""
    found = []
    for movies in drawn_movies(NUM_RESAMPLES, NUM_MOVIES):
        reviews = [idx for movie in movies for idx in np.flatnonzero(movie_idx == movie)]
        of_seeds = [sum(bool(seed[idx]) for idx in reviews) / len(reviews) for seed in correct]
        found.append(sum(of_seeds) / len(of_seeds))
    return found


def test_accuracies_are_those_of_the_reviews_written_out(movie_idx: np.ndarray) -> None:
    correct = right(1, num_seeds=3, share=0.7)
    found = MovieBootstrap(movie_idx, NUM_RESAMPLES).accuracies(correct)
    np.testing.assert_allclose(found, slow_accuracies(correct, movie_idx), rtol=1e-12)


def test_differences_and_ratios_are_of_the_same_draws(movie_idx: np.ndarray) -> None:
    one, other = right(1, num_seeds=3, share=0.7), right(2, num_seeds=1, share=0.5)
    pairs = list(
        zip(slow_accuracies(one, movie_idx), slow_accuracies(other, movie_idx), strict=True)
    )
    bootstrap = MovieBootstrap(movie_idx, NUM_RESAMPLES)
    for found, drawn, value in (
        (bootstrap.difference(one, other), [a - b for a, b in pairs], one.mean() - other.mean()),
        (bootstrap.ratio(one, other), [a / b for a, b in pairs], one.mean() / other.mean()),
    ):
        assert found.value == pytest.approx(value)
        assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


def test_a_model_is_no_better_than_itself(movie_idx: np.ndarray) -> None:
    correct = right(1, num_seeds=2, share=0.6)
    bootstrap = MovieBootstrap(movie_idx, NUM_RESAMPLES)
    assert bootstrap.difference(correct, correct) == Interval(0, 0, 0)
    assert bootstrap.ratio(correct, correct) == Interval(1, 1, 1)


def test_interval_of_movies_that_are_all_right_or_all_wrong() -> None:
    # With as many reviews in each of M movies the accuracy of a draw is a binomial over M: its
    # standard deviation is sqrt(p (1 - p) / M), whatever the number of reviews.
    num_movies, per_movie, share = 400, 5, 0.75
    movie_idx = np.repeat(np.arange(num_movies), per_movie)
    correct = (movie_idx < share * num_movies)[None]
    nothing = np.zeros_like(correct)
    found = MovieBootstrap(movie_idx, 20_000).difference(correct, nothing)
    deviation = np.sqrt(share * (1 - share) / num_movies)
    assert found.value == share
    assert found.high - found.value == pytest.approx(1.96 * deviation, rel=0.05)
    assert found.value - found.low == pytest.approx(1.96 * deviation, rel=0.05)
    # As if reviews were independent, it would be narrower by the square root of 5.
    assert found.high - found.low > 2 * 2 * 1.96 * np.sqrt(share * (1 - share) / len(movie_idx))


def test_margin_says_how_far_inside_zero_lies() -> None:
    assert Interval(-0.01, -0.03, 0.02).margin == 0.02
    assert Interval(-0.02, -0.03, -0.01).margin == -0.01
    assert Interval(0.02, 0.01, 0.03).margin == -0.01
