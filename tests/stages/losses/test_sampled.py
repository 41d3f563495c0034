"""Draws from a teacher: what they estimate on average, and what holds for every draw."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from teacher_cache.cache.codecs.sampled import LEAST_TAIL
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import Measure, divergence, kl, reverse_kl
from teacher_cache.stages.losses.draws import SampledTargets, log_probs_at, sampled_kl

NUM_OUTCOMES = 12


def lse(logits: Tensor, temperature: float) -> Tensor:
    """Relative to the largest logit, as a codec stores it."""
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).logsumexp(dim=-1)


def draw(
    logits: Tensor, num_draws: int, temperature: float = 1.0, tau: float = 1.0, seed: int = 0
) -> SampledTargets:
    """From `p_T ** tau`, for [R, V] logits; every outcome has a slot, many of them empty."""
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    proposal = log_probs if tau == 1 else torch.log_softmax(tau * log_probs, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(proposal.exp(), num_draws, replacement=True, generator=generator)
    counts = torch.zeros_like(logits).scatter_add(1, draws, torch.ones_like(draws).double())
    drawn = counts > 0
    return SampledTargets(
        ids=torch.where(drawn, torch.arange(logits.shape[1]), -1),
        counts=counts.long(),
        log_probs=log_probs.masked_fill(~drawn, -math.inf),
        proposal_log_probs=proposal.masked_fill(~drawn, -math.inf),
        temperature=temperature,
        support_size=logits.shape[1],
    )


def pair(num: int = 1, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, the same at each of `num` positions."""
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(2, NUM_OUTCOMES, generator=generator, dtype=torch.float64)
    return logits[0].expand(num, -1).clone(), logits[1].expand(num, -1).clone()


def gradients(student: Tensor, value_of: Any) -> tuple[Tensor, Tensor]:
    """Values [R] and gradients [R, V], position by position."""
    leaf = student.clone().requires_grad_()
    values = value_of(leaf)
    values.sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def many(temperature: float, tau: float) -> tuple[Tensor, Tensor, SampledTargets]:
    """Logits of student and teacher, and eight draws, 8000 times over.

    Few draws at a time, so that a bias of the order of 1/N stands out.
    """
    student, teacher = pair(8000)
    targets = draw(teacher, 8, tau=tau)
    if temperature != 1.0:
        targets = targets.at_temperature(
            temperature, lse=lse(teacher, 1.0), new_lse=lse(teacher, temperature)
        )
    return student, teacher, targets


def z_scores(found: Tensor, expected: Tensor) -> Tensor:
    """By how many standard errors the mean over the first dimension misses what is expected."""
    return (found.mean(dim=0) - expected) / found.std(dim=0) * math.sqrt(len(found))


@pytest.mark.parametrize(
    ("temperature", "tau"), [(1.0, 1.0), (2.0, 1.0), (0.7, 1.0), (1.0, 0.5), (2.0, 0.5), (3.0, 0.4)]
)
def test_the_mean_over_draws_is_the_full_kl_and_its_gradient(
    temperature: float, tau: float
) -> None:
    student, teacher, targets = many(temperature, tau)
    values, estimates = gradients(student, lambda logits: sampled_kl(logits, targets))
    full = TeacherDistribution.from_logits(teacher[:1], temperature)
    value, gradient = gradients(student[:1], lambda logits: divergence(logits, full))
    assert z_scores(values, value[0]).abs() < 4
    assert z_scores(estimates, gradient[0]).abs().max() < 4


@pytest.mark.parametrize(("temperature", "tau"), [(2.0, 1.0), (1.0, 0.5), (0.7, 1.0)])
def test_the_same_test_tells_that_renormalised_weights_are_biased(
    temperature: float, tau: float
) -> None:
    student, teacher, targets = many(temperature, tau)
    weights = targets.weights() / targets.weights().sum(dim=-1, keepdim=True)
    p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    # Slot i is outcome i here.
    assert z_scores((q - weights) / temperature, ((q - p) / temperature)[0]).abs().max() > 6


@pytest.mark.parametrize(("temperature", "tau"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_equals_its_formula_draw_by_draw(temperature: float, tau: float) -> None:
    student, teacher = pair()
    targets = draw(teacher, 20, tau=tau)
    p, q = (torch.softmax(logits[0] / temperature, -1) for logits in (teacher, student))
    proposal = torch.softmax(tau * teacher[0], -1)
    expected, target = 0.0, torch.zeros_like(p)
    for idx, count in zip(targets.ids[0].tolist(), targets.counts[0].tolist(), strict=True):
        if count:
            weight = count / 20 * p[idx] / proposal[idx]
            expected += weight * (p[idx] / q[idx]).log()
            target[idx] += weight
    if temperature != 1.0:
        targets = targets.at_temperature(
            temperature, lse=lse(teacher, 1.0), new_lse=lse(teacher, temperature)
        )
    value, gradient = gradients(student, lambda logits: sampled_kl(logits, targets))
    torch.testing.assert_close(value, torch.as_tensor(expected).view(1))
    torch.testing.assert_close(gradient[0], (target.sum() * q - target) / temperature)
    assert torch.autograd.gradcheck(
        lambda logits: sampled_kl(logits, targets), student.requires_grad_()
    )


def test_weights_are_shares_of_the_draws_and_are_not_renormalised() -> None:
    _, teacher = pair(300)
    targets = draw(teacher, 50)
    # Exactly: the ratio of teacher to proposal is exp(0).
    assert torch.equal(targets.weights(), targets.counts.double() / 50)
    at_2 = targets.at_temperature(2.0, lse=lse(teacher, 1.0), new_lse=lse(teacher, 2.0))
    sums = at_2.weights().sum(dim=-1)
    assert sums.std() > 0.01
    assert abs(sums.mean() - 1) < 4 * sums.std() / math.sqrt(300)


def test_log_probs_at_another_temperature_are_the_teachers() -> None:
    _, teacher = pair(2, scale=4.0)
    for old, new in ((1.0, 3.0), (2.0, 0.5)):
        found = log_probs_at(
            torch.log_softmax(teacher / old, -1),
            temperature=old,
            lse=lse(teacher, old),
            new_temperature=new,
            new_lse=lse(teacher, new),
        )
        torch.testing.assert_close(found, torch.log_softmax(teacher / new, -1))


def test_effective_draws() -> None:
    _, teacher = pair(4)
    targets = draw(teacher, 50)
    torch.testing.assert_close(targets.num_effective(), torch.full((4,), 50.0).double())
    at_4 = targets.at_temperature(4.0, lse=lse(teacher, 1.0), new_lse=lse(teacher, 4.0))
    for row, weights in enumerate(at_4.weights()):
        each = [  # the weights of the 50 draws, one by one
            float(weight) / count
            for weight, count in zip(weights, targets.counts[row].tolist(), strict=True)
            for _ in range(count)
        ]
        expected = sum(each) ** 2 / sum(one**2 for one in each)
        assert float(at_4.num_effective()[row]) == pytest.approx(expected)
    assert (at_4.num_effective() < 40).all()
    # A flatter proposal is worth more at a high temperature.
    flat = draw(teacher, 50, tau=0.4)
    flat = flat.at_temperature(4.0, lse=lse(teacher, 1.0), new_lse=lse(teacher, 4.0))
    assert (flat.num_effective() > at_4.num_effective()).all()


def test_drawn_ids_are_a_head_with_exact_probabilities() -> None:
    student, teacher = pair(5)
    targets = draw(teacher, 6)
    coarse = targets.coarse()
    p = torch.softmax(teacher, -1)
    assert coarse.tail_log_prob is not None
    for row, ids in enumerate(targets.ids.tolist()):
        inside = [idx for idx in ids if idx >= 0]
        assert 1 < len(inside) < 7
        head = coarse.log_probs[row].exp()
        torch.testing.assert_close(head[inside], p[row, inside])
        torch.testing.assert_close(coarse.tail_log_prob[row].exp(), 1 - p[row, inside].sum())
    full = TeacherDistribution.from_logits(teacher, 1.0)
    assert (divergence(student, coarse, reverse_kl) < divergence(student, full, reverse_kl)).all()


@pytest.mark.parametrize("measure", [kl, reverse_kl])
@pytest.mark.parametrize("head", [[1.0], [0.7, 0.3], [0.7002, 0.3001]])
def test_a_head_that_rounding_brings_to_1_or_above_keeps_the_least_tail(
    head: list[float], measure: Measure
) -> None:
    """Without one, a student that gives the rest some mass would be infinitely far in reverse."""
    log_probs = torch.tensor([head]).log()
    targets = SampledTargets(
        ids=torch.arange(len(head))[None],
        counts=torch.ones(1, len(head)),
        log_probs=log_probs,
        proposal_log_probs=log_probs,
        temperature=1.0,
        support_size=4,
    )
    coarse = targets.coarse()
    outcomes = coarse.outcome_log_probs.exp()
    torch.testing.assert_close(outcomes.sum(-1), torch.ones(1))
    total = sum(head) + LEAST_TAIL
    torch.testing.assert_close(outcomes[0], torch.tensor([*head, LEAST_TAIL]) / total)
    values, gradient = gradients(torch.randn(1, 4), lambda z: divergence(z, coarse, measure))
    assert values.isfinite().all() and gradient.isfinite().all()
    whole = replace(targets, support_size=len(head)).coarse()
    assert whole.tail_log_prob is not None and whole.tail_log_prob.isneginf().all()


def test_excluded_outcomes_and_empty_positions_give_no_nan() -> None:
    student, teacher = pair(3)
    teacher[:, 4] = student[:, 4] = -math.inf
    targets = draw(teacher, 20)
    targets.ids[2], targets.counts[2] = -1, 0  # a position without draws
    targets.log_probs[2] = targets.proposal_log_probs[2] = -math.inf
    values, gradient = gradients(student, lambda z: sampled_kl(z, targets))
    assert values.isfinite().all() and gradient.isfinite().all()
    assert values[2] == 0 and (gradient[2] == 0).all() and (gradient[:, 4] == 0).all()
    assert targets.num_effective()[2] == 0
    coarse = divergence(student, targets.coarse())
    assert coarse.isfinite().all() and coarse[2].abs() < 1e-12

    student[:, 4] = 9.0
    support = torch.arange(NUM_OUTCOMES) != 4
    again, again_gradient = gradients(student, lambda z: sampled_kl(z, targets, support=support))
    assert torch.equal(again, values) and torch.equal(again_gradient, gradient)
    student[:, int(targets.ids[0].max())] = -math.inf  # drawn, and impossible for the student
    values, gradient = gradients(student, lambda z: sampled_kl(z, targets))
    assert values[0] == math.inf and gradient.isfinite().all()


def test_a_part_of_the_positions() -> None:
    student, teacher = pair(5)
    targets = draw(teacher, 20)
    where = torch.tensor([True, False, False, True, True])
    part = sampled_kl(student[where], targets.at_positions(where))
    torch.testing.assert_close(part, sampled_kl(student, targets)[where])


def test_refuses_other_shapes() -> None:
    student, teacher = pair(3)
    targets = draw(teacher, 5)
    with pytest.raises(ValueError, match="they must agree but for the last"):
        sampled_kl(student[:2], targets)
    for changes in ({"counts": targets.counts[:, :3]}, {"log_probs": targets.log_probs[:1]}):
        with pytest.raises(ValueError, match=r"all \[..., D\]"):
            replace(targets, **changes)
    with pytest.raises(ValueError, match="must be positive"):
        targets.at_temperature(0.0, lse=lse(teacher, 1.0), new_lse=lse(teacher, 1.0))
