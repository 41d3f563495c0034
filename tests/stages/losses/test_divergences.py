"""Every divergence, dense and with a ghost token, against float64 loops: values and gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.losses.config import DivergenceName, ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import (
    Measure,
    chosen_measure,
    divergence,
    jsd,
    kl,
    reverse_kl,
    skew_kl,
)
from tests import reference_losses as reference
from tests.sparse_teachers import cut, top_k

TEMPERATURES = [0.5, 1.0, 2.0, 7.3]
NAMES: tuple[DivergenceName, ...] = get_args(DivergenceName)
dense = TeacherDistribution.from_logits


def measure_of(name: DivergenceName) -> Measure:
    """With parameters other than the defaults, which the reference gets as well."""
    return chosen_measure(
        ObjectiveConfig(
            divergence=name,
            jsd_beta=0.3 if name == "jsd" else 0.5,
            skew_alpha=0.2 if name == "skew-kl" else 0.1,
        )
    )


def expected(
    name: str, student: Tensor, teacher: Tensor, temperature: float, heads: Any = None
) -> tuple[Tensor, Tensor]:
    """The reference's values [N] and gradients [N, V], float64."""
    rows = [
        reference.divergence_and_gradient(
            name, t, s, temperature, None if heads is None else heads[idx], beta=0.3, alpha=0.2
        )
        for idx, (t, s) in enumerate(zip(teacher.tolist(), student.tolist(), strict=True))
    ]
    values, gradients = zip(*rows, strict=True)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def found(
    student: Tensor, teacher: TeacherDistribution, measure: Measure = kl, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The values [N] and the gradient [N, V] of their sum."""
    leaf = student.clone().requires_grad_()
    values = divergence(leaf, teacher, measure, **kwargs)
    values.sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def make_logits(num_outcomes: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (6, num_outcomes)
    student = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_outcomes", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference_in_value_and_gradient(
    name: DivergenceName, temperature: float, num_outcomes: int, dtype: torch.dtype
) -> None:
    student, teacher = make_logits(num_outcomes)
    values, gradient = found(
        student.to(dtype), dense(teacher.to(dtype), temperature), measure_of(name)
    )
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    wanted, wanted_gradient = expected(name, student, teacher, temperature)
    assert values.dtype is dtype
    torch.testing.assert_close(values.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_ghost_token_stands_for_the_tail(
    name: DivergenceName, temperature: float, k: int, dtype: torch.dtype
) -> None:
    student, teacher = make_logits(9)
    sparse = top_k(teacher.to(dtype), k, temperature)
    assert sparse.head_ids is not None
    values, gradient = found(student.to(dtype), sparse, measure_of(name))
    wanted, wanted_gradient = expected(
        name, student, teacher, temperature, sparse.head_ids.tolist()
    )
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    torch.testing.assert_close(values.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [2, 5, None])
def test_gradient_is_that_of_finite_differences(name: DivergenceName, k: int | None) -> None:
    student, teacher = make_logits(5)
    leaves = [student.requires_grad_(), teacher.requires_grad_()]

    def value(logits: Tensor, teacher: Tensor) -> Tensor:
        # The teacher's side has a gradient too: of what maps its vocabulary.
        distribution = dense(teacher, 2.0)
        if k is not None:
            log_p = distribution.log_probs
            distribution = TeacherDistribution(
                head_ids=torch.arange(k).expand(6, k),
                log_probs=log_p[:, :k],
                tail_log_prob=log_p[:, k:].logsumexp(-1) if k < 5 else torch.full((6,), -math.inf),
                temperature=2.0,
            )
        return divergence(logits, distribution, measure_of(name))

    assert torch.autograd.gradcheck(value, leaves)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    num_outcomes=st.integers(2, 12),
    k=st.integers(1, 11),
    scale=st.floats(0.01, 20),
    temperature=st.floats(0.5, 8),
    seed=st.integers(0, 2**31),
)
def test_merging_a_tail_bounds_the_full_divergence_from_below(
    name: DivergenceName, num_outcomes: int, k: int, scale: float, temperature: float, seed: int
) -> None:
    student, teacher = make_logits(num_outcomes, scale, seed)
    measure = measure_of(name)
    full, full_gradient = found(student, dense(teacher, temperature), measure)
    part, _ = found(student, top_k(teacher, min(k, num_outcomes), temperature), measure)
    assert (part <= full + 1e-12 * (1 + full)).all()
    assert (part >= -1e-12).all()
    # Of a tail of one outcome there is nothing to merge, and of a head of all no tail.
    for enough in (num_outcomes - 1, num_outcomes):
        same, gradient = found(student, top_k(teacher, enough, temperature), measure)
        torch.testing.assert_close(same, full, rtol=1e-9, atol=1e-12)
        # A gradient is a difference of terms as large as the divergence, and no more exact.
        atol = max(1e-12, 256 * torch.finfo(torch.float64).eps * float(full.detach().max()))
        torch.testing.assert_close(gradient, full_gradient, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_is_right_where_both_tails_are_1e_8(
    name: DivergenceName, dtype: torch.dtype
) -> None:
    student = torch.tensor([[19.0, 20.0, 1.0, 0.5, -1.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[20.0, 19.0, 0.0, 2.0, 1.0, -2.0]], dtype=torch.float64)
    sparse = top_k(teacher, 2, 1.0)
    assert sparse.tail_log_prob is not None
    assert 5e-9 < sparse.tail_log_prob.exp().item() < 5e-8
    of_dtype = TeacherDistribution(
        head_ids=sparse.head_ids,
        log_probs=sparse.log_probs.to(dtype),
        tail_log_prob=sparse.tail_log_prob.to(dtype),
        temperature=1.0,
    )
    values, gradient = found(student.to(dtype), of_dtype, measure_of(name))
    wanted, wanted_gradient = expected(name, student, teacher, 1.0, [[0, 1]])
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(values.double(), wanted, rtol=tolerance, atol=0)
    # Relative: the tail's gradients are of the order of 1e-8 themselves.
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [2, None])
def test_an_outcome_that_both_exclude_is_not_there(
    name: DivergenceName, temperature: float, k: int | None
) -> None:
    student, teacher = make_logits(5)
    student[:, 2] = teacher[:, 2] = -math.inf
    others, measure = [0, 1, 3, 4], measure_of(name)

    def of(teacher: Tensor) -> TeacherDistribution:
        return dense(teacher, temperature) if k is None else top_k(teacher, k, temperature)

    values, gradient = found(student, of(teacher), measure)
    without, without_gradient = found(student[:, others], of(teacher[:, others]), measure)
    torch.testing.assert_close(values, without)
    torch.testing.assert_close(gradient[:, others], without_gradient)
    assert (gradient[:, 2] == 0).all()
    # Taken out by the support, the student need not exclude it itself.
    student[:, 2] = 11.0
    support = torch.arange(5) != 2
    again, again_gradient = found(student, of(teacher), measure, support=support)
    assert torch.equal(again, values) and torch.equal(again_gradient, gradient)
    # And inside the head, not in the tail.
    inside = cut(teacher, torch.tensor([[2, 0, 4]] * 6), temperature)
    values, gradient = found(student, inside, measure, support=support)
    without, _ = found(
        student[:, others],
        cut(teacher[:, others], torch.tensor([[0, 3]] * 6), temperature),
        measure,
    )
    torch.testing.assert_close(values, without)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"reverse-kl"}))
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_outcome_that_only_the_teacher_excludes(
    name: DivergenceName, temperature: float
) -> None:
    student, teacher = make_logits(4)
    teacher[:, 1] = -math.inf
    values, gradient = found(student, dense(teacher, temperature), measure_of(name))
    wanted, wanted_gradient = expected(name, student, teacher, temperature)
    torch.testing.assert_close(values, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-12, rtol=1e-12)


def test_what_is_infinite_is_inf_and_not_nan() -> None:
    student, teacher = make_logits(4)
    allowed = student.clone()
    student[:, 1] = -math.inf
    teacher[:, 1] = teacher.amax(dim=1)  # in the head
    for teacher_of in (partial(dense, temperature=2.0), partial(top_k, k=3, temperature=2.0)):
        # The student excludes what the teacher does not: forward KL is inf, its gradient is not.
        values, gradient = found(student, teacher_of(teacher))
        assert (values == math.inf).all() and gradient.isfinite().all()
        # Mixtures keep the others finite, and the reverse KL does not look there.
        for name in set(NAMES) - {"kl"}:
            values, gradient = found(student, teacher_of(teacher), measure_of(name))
            assert values.isfinite().all() and gradient.isfinite().all(), name
    # And the other way round.
    teacher[:, 1] = -math.inf
    assert (divergence(allowed, dense(teacher, 2.0), reverse_kl) == math.inf).all()
    tail_of_nothing = top_k(teacher, 3, 2.0)
    assert (divergence(allowed, tail_of_nothing, reverse_kl) == math.inf).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_ghost_of_none_of_the_students_outcomes_is_excluded(name: DivergenceName) -> None:
    """As a missing id is: what is left is the divergence over the ids that the student has."""
    student, teacher = make_logits(4)
    num = student.shape[1]
    wide = torch.cat([teacher, teacher[:, :2] + 1], dim=1)  # two ids that the student lacks
    log_probs = torch.log_softmax(wide / 2.0, dim=1)
    order = torch.arange(num).flip(0)
    mapped = TeacherDistribution(
        log_probs=log_probs[:, order],
        temperature=2.0,
        head_ids=order.expand(student.shape),
        tail_log_prob=log_probs[:, num:].logsumexp(dim=1),
    )
    measure = measure_of(name)
    expected, expected_gradient = found(student, dense(teacher, 2.0), measure)
    values, gradient = found(student, mapped, measure)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    # An id of the student's that the head lacks makes it an outcome again.
    padded = torch.cat([student, student[:, :1]], dim=1)
    values, _ = found(padded, mapped, measure)
    assert (values - expected).abs().min() > 1e-3
    only_support = torch.arange(num + 1) < num
    values = divergence(padded, mapped, measure, support=only_support)
    torch.testing.assert_close(values, expected)


def test_a_teacher_of_nothing_but_an_excluded_ghost_is_infinitely_far() -> None:
    student, _ = make_logits(2)
    mapped = TeacherDistribution(
        log_probs=torch.full_like(student, -math.inf),
        temperature=1.0,
        head_ids=torch.arange(2).expand(student.shape),
        tail_log_prob=torch.zeros_like(student[:, 0]),
    )
    values, gradient = found(student, mapped)
    assert (values == math.inf).all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_probability_that_underflows_is_no_nan(name: DivergenceName) -> None:
    # exp(-200) is 0 in float32, and 0 * (-200 + inf) would be NaN.
    teacher = torch.tensor([[0.0, 1.0, -200.0]])
    student = torch.tensor([[0.5, 0.0, -math.inf]])
    for distribution in (dense(teacher, 1.0), top_k(teacher, 2, 1.0)):
        values, gradient = found(student, distribution, measure_of(name))
        assert values.isfinite().all() and gradient.isfinite().all()
        swapped, _ = found(teacher, dense(student, 1.0), measure_of(name))
        assert swapped.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_empty_slots_of_a_ragged_head_are_not_there(name: DivergenceName) -> None:
    student, teacher = make_logits(7)
    ids = teacher.topk(3, dim=-1).indices
    ragged = torch.cat([ids, torch.full((6, 2), -1)], dim=-1)
    measure = measure_of(name)
    values, gradient = found(student, cut(teacher, ids, 2.0), measure)
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 1, 2]):
        again, again_gradient = found(student, cut(teacher, ragged[:, order], 2.0), measure)
        torch.testing.assert_close(again, values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again_gradient, gradient, rtol=1e-12, atol=1e-12)
    # A head of nothing: all is ghost, on both sides.
    nothing, gradient = found(student, cut(teacher, torch.full((6, 2), -1), 2.0), measure)
    torch.testing.assert_close(nothing, torch.zeros(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(6, 7).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_is_nan_is_not_taken_for_one_that_excludes(name: DivergenceName) -> None:
    student, teacher = make_logits(3)
    teacher[0, 0] = math.nan
    values, _ = found(student, dense(teacher, 2.0), measure_of(name))
    assert values[0].isnan()
    assert values[1:].isfinite().all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"reverse-kl"}))
def test_gradient_to_an_excluded_log_prob_is_zero_not_nan(name: DivergenceName) -> None:
    student, teacher = make_logits(3)
    log_probs = torch.log_softmax(teacher, dim=-1)
    log_probs[:, 0] = -math.inf
    log_probs.requires_grad_()
    distribution = TeacherDistribution(log_probs=log_probs, temperature=1.0)
    divergence(student, distribution, measure_of(name)).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    assert (log_probs.grad[:, 0] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_is_zero_against_itself_and_large_logits_stay_finite(name: DivergenceName) -> None:
    student, teacher = make_logits(3, scale=1e4)
    measure = measure_of(name)
    for of in (partial(dense, temperature=2.0), partial(top_k, k=2, temperature=2.0)):
        same, same_gradient = found(teacher, of(teacher), measure)
        far, _ = found(student, of(teacher), measure)
        torch.testing.assert_close(same, torch.zeros(6).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(same_gradient, torch.zeros(6, 3).double(), atol=1e-12, rtol=0)
        assert far.isfinite().all()


def test_parameters_lead_from_one_kl_to_the_other() -> None:
    student, teacher = make_logits(4, scale=1.0)
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    close(skew_kl(log_p, log_q, alpha=1e-6), kl(log_p, log_q))
    close(jsd(log_p, log_q, beta=1e-6) / 1e-6, kl(log_p, log_q))
    close(jsd(log_p, log_q, beta=1 - 1e-6) / 1e-6, reverse_kl(log_p, log_q))
    close(jsd(log_p, log_q, beta=0.5), jsd(log_q, log_p, beta=0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in make_logits(3))
    for of in (partial(dense, temperature=2.0), partial(top_k, k=2, temperature=2.0)):
        values = divergence(student, of(teacher.float()))
        wide = divergence(student.float(), of(teacher.float()))
        assert values.dtype is torch.float32
        assert torch.equal(values, wide)


def test_refuses_other_shapes() -> None:
    student, teacher = make_logits(3)
    with pytest.raises(ValueError, match=r"\(6, 2\) against .*\(6, 3\)"):
        divergence(student[:, :2], dense(teacher, 2.0))
    with pytest.raises(ValueError, match=r"\(5, 3\) against .*\(6, 2\)"):
        divergence(student[:5], top_k(teacher, 2, 2.0))
