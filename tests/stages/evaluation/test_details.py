"""Intervals, bins and disagreements against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.stages.evaluation.details import (
    Judged,
    binned,
    intervals_of,
    largest_of_documents,
    resampled_means,
)

DOCUMENT = np.array([0, 0, 1, 2, 2, 2])
COLUMN = np.array([1.0, 0.0, np.nan, 1.0, 1.0, np.nan])


def test_whole_documents_are_drawn_again() -> None:
    means, drawn = resampled_means(DOCUMENT, [COLUMN, 2 * COLUMN], num_resamples=50)
    assert means.tolist() == [0.75, 1.5] and drawn.shape == (50, 2)
    rng = np.random.default_rng(0)
    for row in drawn:
        chosen = rng.integers(0, 3, 3)
        values = np.concatenate([COLUMN[np.flatnonzero(one == DOCUMENT)] for one in chosen])
        known = values[~np.isnan(values)]
        expected = known.mean() if len(known) else np.nan
        assert np.isclose(row[0], expected, equal_nan=True)
        assert np.isclose(row[1], 2 * expected, equal_nan=True)


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = resampled_means(DOCUMENT, [COLUMN])[1]
    monkeypatch.setattr("teacher_cache.stages.evaluation.details.MOST_DRAWN", 7)
    assert np.array_equal(resampled_means(DOCUMENT, [COLUMN])[1], whole, equal_nan=True)


def test_an_interval_has_the_width_of_the_binomial() -> None:
    right = np.random.default_rng(0).random(2000) < 0.8
    one = Judged(
        document=np.arange(2000), length=np.ones(2000), figures={"accuracy": right.astype(float)}
    )
    (low, high) = intervals_of({"a": one})[0]["a"]["accuracy"]
    assert low < right.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 2000), rel=0.15)


def test_a_difference_is_paired() -> None:
    """Two models that are wrong on nearly the same documents differ by little, and surely so."""
    rng = np.random.default_rng(0)
    first = (rng.random(500) < 0.7).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:10]] = 1.0  # right on ten more
    models = {
        name: Judged(document=np.arange(500), length=np.ones(500), figures={"accuracy": figure})
        for name, figure in (("a", first), ("b", second))
    }
    intervals, (found,) = intervals_of(models)
    assert (found.model, found.other, found.mean) == ("b", "a", pytest.approx(0.02))
    assert 0.005 < found.interval[0] < found.interval[1] < 0.04
    assert intervals["a"]["accuracy"][1] > intervals["b"]["accuracy"][0], "apart they overlap"


def test_models_of_other_documents_have_no_difference() -> None:
    models = {
        name: Judged(document=np.arange(num), length=np.ones(num), figures={"nll": np.ones(num)})
        for name, num in (("a", 3), ("b", 4))
    }
    intervals, differences = intervals_of(models)
    assert differences == [] and intervals["b"] == {"nll": (1.0, 1.0)}


@given(st.lists(st.floats(0, 2), min_size=1, max_size=30))
def test_every_position_is_in_one_range(values: list[float]) -> None:
    by = np.array(values)
    found = binned(by, (0.5, 1.0), {"x": by})
    assert sum(one.num for one in found) == len(by)
    for one in found:
        last = one.high == 1.0
        inside = (by > one.low if one.low else by >= 0) & ((by <= one.high) | last)
        assert one.num == inside.sum() and one.means["x"] == pytest.approx(by[inside].mean())


def test_figures_that_no_position_of_a_range_has_are_left_out() -> None:
    (low, high) = binned(np.array([0.1, 0.9]), (0.5, np.inf), {"x": np.array([1.0, np.nan])})
    assert low.means == {"x": 1.0} and high.means == {} and high.high is None


def test_the_farthest_positions_one_of_a_document() -> None:
    kl = np.array([3.0, 4.0, np.nan, 1.0, 5.0, 2.0])
    assert largest_of_documents(kl, DOCUMENT).tolist() == [4, 1, 2]
    assert largest_of_documents(kl, DOCUMENT, most=1).tolist() == [4]
