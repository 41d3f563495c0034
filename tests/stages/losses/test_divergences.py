import math

import pytest
import torch

from teacher_cache.stages.losses.divergences import forward_kl
from teacher_cache.stages.losses.teacher_distribution import TeacherDistribution
from tests import reference_losses as reference

TEMPERATURES = [0.5, 1.0, 2.0, 7.3]


def _logits(num_classes: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (6, num_classes)
    student = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference_in_value_and_gradient(
    temperature: float, num_classes: int, dtype: torch.dtype
) -> None:
    student, teacher = _logits(num_classes)
    leaf = student.to(dtype).requires_grad_()
    value = forward_kl(leaf, TeacherDistribution.from_logits(teacher.to(dtype), temperature))
    value.sum().backward()

    rows = list(zip(teacher.tolist(), student.tolist(), strict=True))
    expected = torch.tensor([reference.kl(t, s, temperature) for t, s in rows])
    gradient = torch.tensor([reference.kl_gradient(t, s, temperature) for t, s in rows])
    tolerance = 1e-6 if dtype is torch.float64 else 2e-5
    assert leaf.grad is not None
    assert value.dtype is dtype
    torch.testing.assert_close(value.float(), expected, atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(leaf.grad.float(), gradient, atol=tolerance, rtol=1e-5)


def test_gradient_is_that_of_finite_differences() -> None:
    student, teacher = _logits(4)
    distribution = TeacherDistribution.from_logits(teacher, 2.0)
    assert torch.autograd.gradcheck(
        lambda logits: forward_kl(logits, distribution), student.requires_grad_()
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_excluded_outcome_costs_nothing_and_gets_no_nan(temperature: float) -> None:
    student, teacher = _logits(4)
    teacher[:, 1] = -math.inf
    leaf = student.clone().requires_grad_()
    value = forward_kl(leaf, TeacherDistribution.from_logits(teacher, temperature))
    value.sum().backward()
    rows = list(zip(teacher.tolist(), student.tolist(), strict=True))
    expected = torch.tensor([reference.kl(t, s, temperature) for t, s in rows]).double()
    gradient = torch.tensor([reference.kl_gradient(t, s, temperature) for t, s in rows]).double()
    assert leaf.grad is not None
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, atol=1e-6, rtol=1e-6)


def test_an_outcome_that_both_exclude_is_no_nan_either() -> None:
    student, teacher = _logits(3)
    student[:, 2] = teacher[:, 2] = -math.inf
    leaf = student.clone().requires_grad_()
    value = forward_kl(leaf, TeacherDistribution.from_logits(teacher, 2.0))
    value.sum().backward()
    pair = forward_kl(student[:, :2], TeacherDistribution.from_logits(teacher[:, :2], 2.0))
    assert leaf.grad is not None
    torch.testing.assert_close(value, pair)
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[:, 2] == 0).all()


def test_a_teacher_that_is_nan_is_not_taken_for_one_that_excludes() -> None:
    student, teacher = _logits(3)
    teacher[0, 0] = math.nan
    value = forward_kl(student, TeacherDistribution.from_logits(teacher, 2.0))
    assert value[0].isnan()
    assert value[1:].isfinite().all()


def test_gradient_to_an_excluded_log_prob_is_zero_not_nan() -> None:
    student, teacher = _logits(3)
    log_probs = torch.log_softmax(teacher, dim=-1)
    log_probs[:, 0] = -math.inf
    log_probs.requires_grad_()
    forward_kl(student, TeacherDistribution(log_probs=log_probs, temperature=1.0)).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    assert (log_probs.grad[:, 0] == 0).all()


def test_is_zero_against_itself_and_large_logits_stay_finite() -> None:
    student, teacher = _logits(3, scale=1e4)
    same = forward_kl(teacher, TeacherDistribution.from_logits(teacher, 2.0))
    far = forward_kl(student, TeacherDistribution.from_logits(teacher, 2.0))
    assert (same == 0).all()
    assert far.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in _logits(3))
    value = forward_kl(student, TeacherDistribution.from_logits(teacher, 2.0))
    wide = forward_kl(student.float(), TeacherDistribution.from_logits(teacher.float(), 2.0))
    assert value.dtype is torch.float32
    assert torch.equal(value, wide)


def test_refuses_other_shapes_and_temperatures() -> None:
    student, teacher = _logits(3)
    with pytest.raises(ValueError, match=r"\(6, 2\) against .*\(6, 3\)"):
        forward_kl(student[:, :2], TeacherDistribution.from_logits(teacher, 2.0))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            TeacherDistribution.from_logits(teacher, temperature)
