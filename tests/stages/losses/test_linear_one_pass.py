"""The objective of many outcomes in one pass against that of all logits, in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.losses import linear_head
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.linear_head import linear_objective
from teacher_cache.stages.losses.objective import StepTotals
from tests.stages.losses.test_linear_objective import make_inputs, plain, results


@settings(max_examples=150, deadline=None)
@given(
    num=st.integers(0, 9),
    vocab=st.integers(3, 12),
    max_logits=st.integers(1, 120),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["sparse", "sampled", "distinct"]),
    name=st.sampled_from(["kl", "reverse-kl", "jsd", "tv"]),
    temperature=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    conf_power=st.sampled_from([0.0, 1.0]),
    has_bias=st.booleans(),
    has_support=st.booleans(),
    has_labels=st.booleans(),
    scale=st.sampled_from([1.0, 40.0]),
)
def test_one_pass_gives_the_same_terms_and_gradients(
    num: int,
    vocab: int,
    max_logits: int,
    seed: int,
    kind: str,
    name: Any,
    temperature: float,
    conf_power: float,
    has_bias: bool,
    has_support: bool,
    has_labels: bool,
    scale: float,
) -> None:
    """What large vocabularies take, in float64 against the objective of all logits."""
    config = ObjectiveConfig(
        divergence=name, conf_power=conf_power, temperature=temperature, unlabeled_alpha=0.4
    )
    hidden, weight, others = make_inputs(num, 4, vocab, seed, config, kind)
    hidden = hidden * scale
    del others["has_teacher"]
    others["totals"] = StepTotals(
        num_labeled=2 * num, num_unlabeled=2 * num, num_labels=2 * num,
        conf_weight_sum_labeled=3.0 * num, conf_weight_sum_unlabeled=3.0 * num,
    )  # fmt: skip
    others["labels"][::3] = NO_LABEL
    if not has_labels:
        others["labels"] = None
    if has_bias:
        others["bias"] = torch.linspace(-1, 2, vocab, dtype=torch.float64)
    if has_support:
        others["support"] = torch.arange(vocab) != vocab - 1
    with patch.object(linear_head, "MANY_OUTCOMES", 0):
        found = results(linear_objective, hidden, weight, max_logits=max_logits, **others)
    expected = results(plain, hidden, weight, **others)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, msg=key)


def test_only_many_outcomes_take_one_pass() -> None:
    """Fewer keep the bits of earlier releases; what needs every outcome takes the long way."""
    config = ObjectiveConfig()
    with patch.object(linear_head, "_in_one_pass", side_effect=AssertionError("taken")):
        hidden, weight, others = make_inputs(3, 4, 300, 0, config, "sparse")
        others["has_teacher"] = None
        results(linear_objective, hidden, weight, **others)
        hidden, weight, others = make_inputs(3, 4, 9000, 0, config, "dense")
        results(linear_objective, hidden, weight, **others)
        hidden, weight, others = make_inputs(3, 4, 9000, 0, config, "sparse")
        others["has_teacher"] = None
        with pytest.raises(AssertionError, match="taken"):
            results(linear_objective, hidden, weight, **others)
        results(linear_objective, hidden, weight, soft_cap=3.0, **others)


def test_one_pass_refuses_what_the_objective_refuses() -> None:
    hidden, weight, others = make_inputs(3, 4, 9, 0, ObjectiveConfig(), "sparse")
    others["has_teacher"] = None
    hotter: dict[str, Any] = others | {"config": ObjectiveConfig(temperature=3)}
    with patch.object(linear_head, "MANY_OUTCOMES", 0):
        with pytest.raises(ValueError, match="the objective at 3"):
            linear_objective(hidden, weight, **hotter)
        with pytest.raises(ValueError, match="when unlabeled_alpha is 0"):
            linear_objective(
                hidden, weight, **others | {"labels": None, "totals": StepTotals(num_unlabeled=9)}
            )
