from __future__ import annotations

import pytest
import torch

from teacher_cache.stages.losses.layers import pooled_distance
from tests import reference_losses as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_one_sample_at_a_time(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 7, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = (100 * torch.randn(6, 7, generator=generator)).half()
    found = pooled_distance(student.to(dtype), teacher)
    assert found.dtype == dtype
    pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = [1 - reference.cosine(s, t) for s, t in pairs]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    slow = [[-one for one in reference.cosine_gradient(s, t)] for s, t in pairs]
    torch.testing.assert_close(gradient, torch.tensor(slow).double(), rtol=1e-5, atol=1e-6)


def test_half_precision_is_widened_and_length_does_not_count() -> None:
    teacher = torch.full((2, 3), 60000.0).half()
    found = pooled_distance(torch.tensor([[1.0, 1.0, 1.0], [-5.0, -5.0, -5.0]]).half(), teacher)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([0.0, 2.0], abs=1e-6)


def test_zeros_have_no_direction() -> None:
    student = torch.ones(1, 3, requires_grad=True)
    found = pooled_distance(student, torch.zeros(1, 3))
    found.sum().backward()
    assert found.item() == 1.0
    assert student.grad is not None and student.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\) against the teacher's \(2, 3\)"):
        pooled_distance(torch.ones(2, 1), torch.ones(2, 3))
