"""Distances between maps against loops over entries, in loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from teacher_cache.stages.losses.config import AttentionLoss
from teacher_cache.stages.losses.layers import (
    SMOOTHING,
    attention_distance,
    normalised_rows,
)
from tests import reference_losses as reference

LOSSES: tuple[AttentionLoss, ...] = ("kl", "frobenius", "cosine")


def row_distance(
    student: list[float], teacher: list[float], allowed: list[bool], loss: str
) -> float:
    """One row, entry by entry."""
    kept = [j for j, counts in enumerate(allowed) if counts]
    if not any(teacher):
        return 0.0
    total = sum(student[j] for j in kept)
    q = [student[j] / total if total else 0.0 for j in kept]
    p = [teacher[j] for j in kept]
    if loss == "frobenius":
        return sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    if loss == "cosine":
        return 1 - reference.cosine(q, p) if total else 1.0
    smoothed = [(1 - SMOOTHING) * b + SMOOTHING / len(kept) for b in q]
    return sum(a * math.log(a / b) for a, b in zip(p, smoothed, strict=True) if a)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Maps [3, 5, 5] with zeros among both, rows without a teacher, rows that may hold nothing."""
    generator = torch.Generator().manual_seed(0)
    student = torch.rand(3, 5, 5, generator=generator, dtype=torch.float64)
    allowed = torch.rand(3, 5, 5, generator=generator) < 0.7
    teacher = torch.rand(3, 5, 5, generator=generator, dtype=torch.float64) * allowed
    student[0, 1, 2] = teacher[0, 2, 1] = 0
    allowed[1, 3] = False
    teacher[1, 3] = teacher[2, 0] = 0
    student[2, 4] = 0  # a row without any mass, where the teacher has some
    allowed[2, 4, 1], teacher[2, 4, 1] = True, 0.5
    return student, normalised_rows(teacher, allowed), allowed


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_loop_over_entries(loss: AttentionLoss) -> None:
    student, teacher, allowed = inputs()
    found = attention_distance(student, teacher, allowed, loss=loss)
    for b in range(3):
        for i in range(5):
            expected = row_distance(
                student[b, i].tolist(), teacher[b, i].tolist(), allowed[b, i].tolist(), loss
            )
            assert found[b, i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12), (b, i)
    narrow = attention_distance(student.float(), teacher.float(), allowed, loss=loss)
    torch.testing.assert_close(narrow.double(), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss: AttentionLoss) -> None:
    student, teacher, allowed = inputs()
    student[student == 0] = 0.3  # at 0 a row of zeros has no derivative
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda one: attention_distance(one, teacher, allowed, loss=loss), (student,)
    )
    (gradient,) = torch.autograd.grad(
        attention_distance(student, teacher, allowed, loss=loss).sum(), student
    )
    assert (gradient[~allowed] == 0).all() and (gradient[2, 0] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_zeros_give_no_nan_and_no_gradient(loss: AttentionLoss) -> None:
    student, teacher, allowed = inputs()
    student.requires_grad_()
    found = attention_distance(student, teacher, allowed, loss=loss)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all() and gradient.isfinite().all()
    assert (gradient[2, 4] == 0).all() and found[2, 4] > 0
    assert (found[1, 3], found[2, 0]) == (0, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_maps_are_at_no_distance_whatever_their_scale(loss: AttentionLoss) -> None:
    _, teacher, allowed = inputs()
    found = attention_distance(7 * teacher, teacher, allowed, loss=loss)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-5)


def test_an_entry_that_a_decay_made_0_costs_a_finite_kl() -> None:
    teacher = torch.tensor([[0.5, 0.5]])
    found = attention_distance(
        torch.tensor([[1.0, 0.0]]), teacher, torch.ones(1, 2, dtype=torch.bool), loss="kl"
    )
    assert found.item() == pytest.approx(0.5 * math.log(2 / SMOOTHING) - math.log(2), rel=1e-3)


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) against the teacher's \(1, 3\)"):
        attention_distance(
            torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), loss="kl"
        )
