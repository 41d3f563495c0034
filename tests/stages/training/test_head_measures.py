"""Figures of labels and numbers, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.stages.training.measures import (
    multi_label_likeness,
    multi_label_metrics,
    regression_metrics,
)
from tests import reference_losses as reference


def f1(right: int, given_: int, there: int) -> float:
    return 2 * right / (given_ + there)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31), num=st.integers(1, 12), num_labels=st.integers(1, 5),
    threshold=st.sampled_from([0.2, 0.5, 0.9]),
)  # fmt: skip
def test_f1_of_labels(seed: int, num: int, num_labels: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((num, num_labels))
    truth = rng.integers(0, 2, (num, num_labels)) * (rng.random(num_labels) < 0.7)
    found = multi_label_metrics(logits, truth, threshold=threshold)
    given_ = [[reference.sigmoid(one) > threshold for one in row] for row in logits.tolist()]
    counts = [
        (
            sum(given_[i][c] and truth[i][c] == 1 for i in range(num)),
            sum(given_[i][c] for i in range(num)),
            int(truth[:, c].sum()),
        )
        for c in range(num_labels)
    ]
    occurring = [one for one in counts if one[1] + one[2]]
    sums = [sum(one[k] for one in counts) for k in range(3)]
    assert found["micro_f1"] == pytest.approx(f1(*sums) if occurring else 1.0)
    macro = [f1(*one) for one in occurring]
    assert found["macro_f1"] == pytest.approx(sum(macro) / len(macro) if macro else 1.0)
    exact = [given_[i] == (truth[i] == 1).tolist() for i in range(num)]
    assert found["exact_match"] == pytest.approx(sum(exact) / num)

    teacher = 2 * rng.standard_normal((num, num_labels))
    likeness = multi_label_likeness(logits, teacher)
    pairs = list(zip(teacher.flatten().tolist(), logits.flatten().tolist(), strict=True))
    kls = [reference.binary_kl(t, s, 1.0) for t, s in pairs]
    assert likeness["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-9)
    assert likeness["agreement"] == pytest.approx(np.mean([(t > 0) == (s > 0) for t, s in pairs]))


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=15
    )
)  # fmt: skip
def test_correlations_of_numbers_with_ties(pairs: list[tuple[int, int]]) -> None:
    one, other = ([float(pair[k]) for pair in pairs] for k in (0, 1))
    found = regression_metrics(np.array(one)[:, None], np.array(other))
    errors = [(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    assert found["mse"] == pytest.approx(sum(errors) / len(errors))
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])
        return
    assert found["pearson"] == pytest.approx(reference.correlation(one, other), abs=1e-12)
    spearman = reference.correlation(reference.ranks(one), reference.ranks(other))
    assert found["spearman"] == pytest.approx(spearman, abs=1e-12)


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        multi_label_metrics(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="against teacher"):
        multi_label_likeness(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="against numbers"):
        regression_metrics(np.zeros((2, 2)), np.zeros(2))
