"""Chunk likelihood matching against a float64 loop over chunks, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.stages.losses.chunk_likelihood import (
    SHIFT,
    chunk_likelihood_loss,
    chunk_log_likelihoods,
)

log_likelihoods = st.floats(-200, -1e-3)
taus = st.sampled_from([1.0, 2.0, 20.0, 100.0])


def _loss_slowly(teacher: float, student: float, tau: float) -> float:
    p = math.exp(teacher / tau - SHIFT)
    q = math.exp(student / tau - SHIFT)
    other = (1 - p) * math.log((1 - p) / (1 - q))
    return (p * math.log(p / q) if p > 0 else 0.0) + other


def _gradient_slowly(teacher: float, student: float, tau: float) -> float:
    """d loss / d log q = -p + (1 - p) q / (1 - q), and log q is student / tau."""
    p = math.exp(teacher / tau - SHIFT)
    q = math.exp(student / tau - SHIFT)
    return (-p + (1 - p) * q / (1 - q)) / tau


@settings(max_examples=200)
@given(teacher=log_likelihoods, student=log_likelihoods, tau=taus)
def test_value_and_gradient_equal_the_formula(teacher: float, student: float, tau: float) -> None:
    theirs = torch.tensor([[student]], dtype=torch.float64, requires_grad=True)
    ours = torch.tensor([[teacher]], dtype=torch.float64)
    loss = chunk_likelihood_loss(theirs, ours, torch.tensor([[True]]), tau=tau)
    loss.sum().backward()
    assert theirs.grad is not None
    assert loss.item() == pytest.approx(_loss_slowly(teacher, student, tau), rel=1e-6, abs=1e-9)
    assert theirs.grad.item() == pytest.approx(
        _gradient_slowly(teacher, student, tau), rel=1e-6, abs=1e-9
    )
    assert loss.item() >= -1e-12


@settings(max_examples=50)
@given(same=st.floats(-300, 0), tau=taus)
def test_equal_likelihoods_are_the_optimum(same: float, tau: float) -> None:
    student = torch.tensor([[same]], dtype=torch.float64, requires_grad=True)
    loss = chunk_likelihood_loss(student, student.detach(), torch.tensor([[True]]), tau=tau)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad is not None and student.grad.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("student", [0.0, -1e-7, -5.0, -1e4])
@pytest.mark.parametrize("teacher", [0.0, -1e-7, -5.0, -1e4, -math.inf])
def test_float32_stays_finite_at_both_ends(teacher: float, student: float) -> None:
    logits = torch.tensor([[student]], requires_grad=True)
    loss = chunk_likelihood_loss(logits, torch.tensor([[teacher]]), torch.tensor([[True]]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_a_student_that_rules_out_what_the_teacher_says_is_infinitely_wrong() -> None:
    loss = chunk_likelihood_loss(
        torch.tensor([[-math.inf, -math.inf]]),
        torch.tensor([[-1.0, -math.inf]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    assert loss.tolist() == [[math.inf, 0.0]]


def test_masked_chunks_add_nothing_whatever_they_hold() -> None:
    student = torch.tensor([[math.nan, -math.inf, -2.0]], requires_grad=True)
    teacher = torch.tensor([[-1.0, math.nan, -1.0]])
    loss = chunk_likelihood_loss(student, teacher, torch.tensor([[False, False, True]]), tau=2.0)
    loss.sum().backward()
    assert loss[0, :2].tolist() == [0.0, 0.0]
    assert student.grad is not None
    assert student.grad[0, :2].tolist() == [0.0, 0.0]
    assert student.grad[0, 2].item() == pytest.approx(_gradient_slowly(-1, -2, 2.0), rel=1e-4)


def test_chunks_sum_the_log_probs_of_their_tokens() -> None:
    log_probs = torch.tensor(
        [[-1.0, -2.0, -4.0, -8.0, math.nan], [-0.5, -math.inf, -0.25, 0.0, 0.0]],
        requires_grad=True,
    )
    index = torch.tensor([[0, 0, 1, 1, -1], [1, -1, 1, 2, -1]])
    sums = chunk_log_likelihoods(log_probs, index, num_chunks=3)
    assert sums.tolist() == [[-3.0, -12.0, 0.0], [0.0, -0.75, 0.0]]
    sums.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[1, 1, 1, 1, 0], [1, 0, 1, 1, 0]]


def test_the_whole_way_from_logits_has_the_right_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    next_ids = torch.tensor([[3, 1, 6, 0, 2]])
    index = torch.tensor([[0, 1, 1, 2, -1]])
    teacher = torch.tensor([[-1.5, -4.0, -0.1]], dtype=torch.float64)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        log_probs = logits.log_softmax(dim=-1).gather(-1, next_ids[..., None])[..., 0]
        student = chunk_log_likelihoods(log_probs, index, num_chunks=3)
        return chunk_likelihood_loss(student, teacher, torch.ones(1, 3, dtype=torch.bool), tau=3.0)

    assert torch.autograd.gradcheck(loss, (logits,))
    with torch.no_grad():
        logits[0, 4, 0] += 5  # predicts no chunk's token
    assert torch.autograd.grad(loss(logits).sum(), logits)[0][0, 4].abs().sum() == 0


def test_descending_the_loss_brings_the_student_to_the_teacher() -> None:
    logs = torch.full((1, 3), 3.0, requires_grad=True)  # of minus the log-likelihoods
    teacher = torch.tensor([[-1.0, -10.0, -80.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    optimizer = torch.optim.Adam([logs], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        chunk_likelihood_loss(-logs.exp(), teacher, mask).sum().backward()
        optimizer.step()
    assert torch.allclose(-logs.exp(), teacher, rtol=0.02)


def test_what_does_not_fit_is_refused() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="must be positive"):
        chunk_likelihood_loss(one, one, one.bool(), tau=0)
    with pytest.raises(ValueError, match="must agree"):
        chunk_likelihood_loss(one, one[0], one.bool())
    with pytest.raises(ValueError, match="chunk index of shape"):
        chunk_log_likelihoods(one, torch.zeros(1, 2, dtype=torch.int64), num_chunks=1)
    for wrong in (-2, 1):
        with pytest.raises(ValueError, match="outside"):
            chunk_log_likelihoods(one, torch.tensor([[wrong]]), num_chunks=1)
