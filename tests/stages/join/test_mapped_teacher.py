"""The teacher's distribution over the student's ids, against float64 loops over probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.tokens.mapped_teacher import (
    coverage,
    map_head,
    project_logits,
    scatter_logsumexp,
)
from teacher_cache.stages.tokens.token_bytes import TokenBytes
from teacher_cache.stages.tokens.vocabulary_map import exact_map

NUM_TEACHER = 9
NUM_STUDENT = 6
maps = st.lists(st.integers(-1, NUM_STUDENT - 1), min_size=NUM_TEACHER, max_size=NUM_TEACHER)


def _projected_slowly(logits: Tensor, student_ids: list[int]) -> tuple[list[float], float]:
    """Probabilities by student id, and what maps to none."""
    weights = [math.exp(logit) for logit in logits.tolist()]
    masses, unmatched = [0.0] * NUM_STUDENT, 0.0
    for teacher_id, student_id in enumerate(student_ids):
        share = weights[teacher_id] / sum(weights)
        if student_id < 0:
            unmatched += share
        else:
            masses[student_id] += share
    return masses, unmatched


@settings(max_examples=50)
@given(student_ids=maps, seed=st.integers(0, 100), excluded=st.integers(0, NUM_TEACHER - 1))
def test_a_full_distribution_equals_a_slow_loop(
    student_ids: list[int], seed: int, excluded: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, NUM_TEACHER, generator=generator, dtype=torch.float64)
    logits[..., excluded] = -torch.inf
    log_probs, unmatched = project_logits(logits, torch.tensor(student_ids), num_rows=NUM_STUDENT)
    assert log_probs.shape == (2, 3, NUM_STUDENT)
    for batch in range(2):
        for position in range(3):
            masses, none = _projected_slowly(logits[batch, position], student_ids)
            found = log_probs[batch, position].exp().tolist()
            assert found == pytest.approx(masses, abs=1e-12)
            assert float(unmatched[batch, position].exp()) == pytest.approx(none, abs=1e-12)


def test_masses_far_below_float32s_smallest_number_stay() -> None:
    logits = torch.tensor([0.0, -300.0, -301.0])
    log_probs, _ = project_logits(logits, torch.tensor([0, 1, 1]), num_rows=3)
    assert log_probs[1] == pytest.approx(-300 + math.log1p(math.exp(-1)), rel=1e-6)
    assert log_probs[2] == -torch.inf


@st.composite
def heads(draw: st.DrawFn) -> tuple[list[int], list[float], float]:
    """Distinct ids, some slots empty; their probabilities; and the tail's."""
    ids = draw(st.lists(st.integers(0, NUM_TEACHER - 1), unique=True, min_size=1, max_size=6))
    num_empty = draw(st.integers(0, 3))
    weights = draw(st.lists(st.floats(0.01, 1), min_size=len(ids) + 1, max_size=len(ids) + 1))
    probs = [weight / sum(weights) for weight in weights]
    return ids + [-1] * num_empty, probs[:-1] + [0.0] * num_empty, probs[-1]


@settings(max_examples=100)
@given(head=heads(), student_ids=maps)
def test_a_head_equals_a_slow_loop(
    head: tuple[list[int], list[float], float], student_ids: list[int]
) -> None:
    ids, probs, tail = head
    expected: dict[int, float] = {}
    expected_tail = tail
    for token_id, prob in zip(ids, probs, strict=True):
        if token_id >= 0 and student_ids[token_id] >= 0:
            student_id = student_ids[token_id]
            expected[student_id] = expected.get(student_id, 0.0) + prob
        else:
            expected_tail += prob
    mapped_ids, log_probs, mapped_tail = map_head(
        torch.tensor([ids]),
        torch.tensor([probs], dtype=torch.float64).log(),
        torch.tensor([tail], dtype=torch.float64).log(),
        torch.tensor(student_ids),
    )
    slots = list(zip(mapped_ids[0].tolist(), log_probs[0].tolist(), strict=True))
    assert len(slots) == len(ids)
    found = {token_id: math.exp(value) for token_id, value in slots if token_id >= 0}
    assert found == pytest.approx(expected)
    assert all(value == -math.inf for token_id, value in slots if token_id < 0)
    assert len([token_id for token_id, _ in slots if token_id >= 0]) == len(found)
    assert log_probs[0].tolist() == sorted(log_probs[0].tolist(), reverse=True)
    assert float(mapped_tail.exp()) == pytest.approx(expected_tail)


def test_a_head_that_is_everything_has_no_tail() -> None:
    ids, log_probs, tail = map_head(
        torch.tensor([[0, 1]]),
        torch.tensor([[0.25, 0.75]]).log(),
        torch.tensor([-torch.inf]),
        torch.tensor([1, 0]),
    )
    assert ids.tolist() == [[0, 1]]
    assert log_probs.exp().tolist() == [[0.75, 0.25]]
    assert tail.tolist() == [-torch.inf]


def test_ids_are_never_clamped() -> None:
    student_ids = torch.tensor([0, 1, -1])
    for wrong in (-2, 3):
        with pytest.raises(ValueError, match="but there are 3"):
            map_head(torch.tensor([[wrong]]), torch.zeros(1, 1), torch.zeros(1), student_ids)
    with pytest.raises(ValueError, match="but there are 1"):
        project_logits(torch.zeros(3), student_ids, num_rows=1)
    with pytest.raises(ValueError, match="4 columns"):
        project_logits(torch.zeros(4), student_ids, num_rows=2)


def test_coverage_is_the_mean_mass_that_maps() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]).log()
    log_probs, unmatched = project_logits(logits, torch.tensor([1, 1, -1]), num_rows=2)
    mask = torch.tensor([True, True, False])
    assert float(coverage(log_probs, mask)) == pytest.approx((0.3 + 0.75) / 2)
    assert unmatched.exp().tolist() == pytest.approx([0.7, 0.25, 1.0])


def test_gradients_of_the_scatter_are_right_and_finite() -> None:
    values = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 0, 3, 1, 3, 3, 0], [2, 2, 2, 2, 2, 2, 2]])

    def reached(values: Tensor) -> Tensor:
        sums = scatter_logsumexp(values, index, 5)
        return torch.where(sums == -torch.inf, 0.0, sums)

    assert torch.autograd.gradcheck(reached, (values,))
    with torch.no_grad():
        values[0, 3] = -torch.inf
    reached(values).sum().backward()
    assert values.grad is not None and torch.isfinite(values.grad).all()


def test_real_tables_keep_all_mass(smollm2_table: TokenBytes, gpt2_table: TokenBytes) -> None:
    found = exact_map(smollm2_table, gpt2_table)
    student_ids = torch.from_numpy(found.student_ids)
    logits = torch.randn(4, len(smollm2_table), generator=torch.Generator().manual_seed(0))
    log_probs, unmatched = project_logits(logits, student_ids, num_rows=len(gpt2_table))
    total = torch.logaddexp(log_probs.logsumexp(dim=-1), unmatched)
    assert torch.allclose(total, torch.zeros(4), atol=1e-5)
    probs = logits.double().softmax(dim=-1).numpy()
    expected = np.zeros((4, len(gpt2_table)))
    mapped = found.student_ids >= 0
    np.add.at(expected.T, found.student_ids[mapped], probs.T[mapped])
    assert np.allclose(log_probs.exp().numpy(), expected, atol=1e-8)
