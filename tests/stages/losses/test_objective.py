"""The objective at positions of packed text against loops over them, however a step is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.losses.config import DivergenceName, ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import chosen_measure, divergence
from teacher_cache.stages.losses.draws import SampledTargets, sampled_kl
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    Targets,
    confidence_weights,
    distillation_objective,
)
from tests import reference_losses as reference
from tests.sparse_teachers import top_k

VOCAB, K = 9, 3


@dataclass
class Step:
    """One optimizer step's positions, float64; the first `num_labeled` have next tokens to learn.

    `has_teacher` is False at some, and `next_ids` is `NO_LABEL` at some.
    """

    student: Tensor
    teacher: Tensor
    next_ids: Tensor
    has_teacher: Tensor
    num_labeled: int

    @property
    def top1_log_prob(self) -> Tensor:
        """At T = 1, of all outcomes."""
        return torch.log_softmax(self.teacher, dim=-1).amax(dim=-1)


def make_step(seed: int, num_labeled: int, num_unlabeled: int, gaps: float = 0.3) -> Step:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_labeled + num_unlabeled, VOCAB)
    next_ids = torch.randint(VOCAB, shape[:1], generator=generator)
    return Step(
        student=2 * torch.randn(shape, generator=generator, dtype=torch.float64),
        teacher=3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        next_ids=torch.where(torch.rand(shape[0], generator=generator) < gaps, NO_LABEL, next_ids),
        has_teacher=torch.rand(shape[0], generator=generator) >= gaps,
        num_labeled=num_labeled,
    )


def targets_of(step: Step, config: ObjectiveConfig, kind: str) -> Targets:
    if kind == "dense":
        return TeacherDistribution.from_logits(step.teacher, config.temperature)
    if kind == "sparse":
        return top_k(step.teacher, K, config.temperature)
    ids = step.teacher.topk(4, dim=-1).indices
    log_probs = torch.log_softmax(step.teacher / config.temperature, dim=-1).gather(-1, ids)
    counts = torch.tensor([4, 3, 2, 1]).expand(len(ids), 4)
    return SampledTargets(
        ids=ids,
        counts=counts,
        log_probs=log_probs,
        proposal_log_probs=log_probs - 0.1,
        temperature=config.temperature,
        support_size=step.teacher.shape[-1],
    )


def totals_of(top1: Tensor, conf_power: float, **kwargs: Any) -> StepTotals:
    weights = confidence_weights(top1, conf_power) if conf_power else None
    return StepTotals.of(len(top1), conf_weights=weights, **kwargs)


def run(
    step: Step, config: ObjectiveConfig, borders: list[int], kind: str = "sparse", **kwargs: Any
) -> tuple[list[ObjectiveTerms], Tensor]:
    """Terms of every micro-batch, and the step's accumulated gradient."""
    leaf = step.student.clone().requires_grad_()
    targets = targets_of(step, config, kind)
    edges = sorted({0, step.num_labeled, len(leaf), *borders})
    batches = [(slice(start, end), end <= step.num_labeled) for start, end in pairwise(edges)]
    totals = sum(
        (
            totals_of(
                step.top1_log_prob[where][step.has_teacher[where]],
                config.conf_power,
                labeled=labeled,
                num_labels=int((step.next_ids[where] >= 0).sum()),
            )
            for where, labeled in batches
        ),
        StepTotals(),
    )
    terms = []
    for where, labeled in batches:
        terms.append(
            distillation_objective(
                leaf[where],
                targets.at_positions(where),
                step.next_ids[where] if labeled else None,
                config=config,
                totals=totals,
                top1_log_prob=step.top1_log_prob[where],
                has_teacher=step.has_teacher[where],
                **kwargs,
            )
        )
        terms[-1].loss.backward()
    assert leaf.grad is not None
    return terms, leaf.grad


def total(terms: list[ObjectiveTerms]) -> float:
    return sum(term.loss.item() for term in terms)


def slow_loss(step: Step, c: ObjectiveConfig, head_size: int | None) -> float:
    """Position by position; a teacher of everything, or of its `head_size` most probable."""
    loss, teacher, student = 0.0, step.teacher.tolist(), step.student.tolist()
    for labeled, weight in ((True, c.alpha), (False, c.unlabeled_alpha)):
        mine = [
            idx
            for idx in range(len(teacher))
            if (idx < step.num_labeled) == labeled and step.has_teacher[idx]
        ]
        kds, raw = [], []
        for idx in mine:
            head = None
            if head_size is not None:
                head = sorted(range(VOCAB), key=lambda i, t=teacher[idx]: -t[i])[:head_size]
            kd, _ = reference.divergence_and_gradient(
                c.divergence,
                teacher[idx],
                student[idx],
                c.temperature,
                head,
                beta=c.jsd_beta,
                alpha=c.skew_alpha,
            )
            kds.append(kd)
            raw.append(max(reference.softmax(teacher[idx])) ** c.conf_power)
        if mine:
            mean = sum(raw) / len(raw)
            kd = sum(w / mean * kd for w, kd in zip(raw, kds, strict=True)) / len(kds)
            loss += weight * c.temperature**2 * kd
    wanted = step.next_ids[: step.num_labeled].tolist()
    ces = [
        reference.cross_entropy(student[idx], wanted[idx], c.label_smoothing)
        for idx in range(step.num_labeled)
        if wanted[idx] != NO_LABEL
    ]
    return loss + (1 - c.alpha) * sum(ces) / max(1, len(ces))


configs = st.builds(
    ObjectiveConfig,
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    divergence=st.sampled_from(["kl", "reverse-kl", "jsd", "skew-kl", "tv"]),
    conf_power=st.sampled_from([0.0, 0.5, 2.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    unlabeled_alpha=st.floats(0.01, 2),
)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_labeled=st.integers(1, 9),
    num_unlabeled=st.integers(0, 9),
    borders=st.lists(st.integers(1, 17), max_size=6),
    config=configs,
    kind=st.sampled_from(["dense", "sparse", "sampled"]),
)
def test_no_way_of_cutting_the_step_changes_it(
    seed: int,
    num_labeled: int,
    num_unlabeled: int,
    borders: list[int],
    config: ObjectiveConfig,
    kind: str,
) -> None:
    step = make_step(seed, num_labeled, num_unlabeled)
    inside = [border for border in borders if border < num_labeled + num_unlabeled]
    whole, whole_gradient = run(step, config, [], kind)
    parts, gradient = run(step, config, inside, kind)
    assert total(parts) == pytest.approx(total(whole), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-9, atol=1e-12)
    of_labeled = [term for term in parts if term.ce is not None]
    for name in ("kd", "ce", "conf_w", "agreement", "effective_draws"):
        values = [getattr(term, name) for term in of_labeled]
        expected = getattr(whole[0], name)
        assert (expected is None) == (values[0] is None)
        if expected is not None:
            assert float(sum(values)) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    if kind != "sampled":
        expected = slow_loss(step, config, K if kind == "sparse" else None)
        assert total(parts) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("kind", ["dense", "sparse", "sampled"])
def test_gradient_is_that_of_finite_differences(kind: str) -> None:
    step = make_step(1, 5, 0)
    config = ObjectiveConfig(alpha=0.7, conf_power=1.0, label_smoothing=0.1, temperature=1.5)
    top1 = step.top1_log_prob
    totals = totals_of(top1[step.has_teacher], 1.0, labeled=True, num_labels=4)

    def loss(logits: Tensor) -> Tensor:
        return distillation_objective(
            logits,
            targets_of(step, config, kind),
            step.next_ids,
            config=config,
            totals=totals,
            top1_log_prob=top1,
            has_teacher=step.has_teacher,
        ).loss

    assert torch.autograd.gradcheck(loss, step.student.requires_grad_())


def test_every_position_has_a_teacher_unless_said_otherwise() -> None:
    step = make_step(2, 8, 0, gaps=0.0)
    config = ObjectiveConfig(conf_power=0.5)
    arguments: dict[str, Any] = {
        "config": config,
        "totals": totals_of(step.top1_log_prob, 0.5, labeled=True),
        "top1_log_prob": step.top1_log_prob,
    }
    targets = targets_of(step, config, "sparse")
    found = distillation_objective(step.student, targets, step.next_ids, **arguments)
    masked, _ = run(step, config, [])
    torch.testing.assert_close(found.loss, masked[0].loss)


def test_what_stands_where_there_is_no_teacher_is_not_read() -> None:
    step, config = make_step(3, 9, 0), ObjectiveConfig(conf_power=1.0)
    terms, gradient = run(step, config, [])
    spoilt = replace(step, teacher=step.teacher.clone())
    spoilt.teacher[~step.has_teacher] = math.nan
    again, again_gradient = run(spoilt, config, [])
    assert torch.equal(terms[0].loss, again[0].loss)
    assert torch.equal(gradient, again_gradient)


def test_confidence_comes_from_the_cache_and_touches_the_distillation_only() -> None:
    step = make_step(4, 8, 0, gaps=0.0)
    plain, _ = run(step, ObjectiveConfig(), [])
    weighted, _ = run(step, ObjectiveConfig(conf_power=2.0), [])
    assert plain[0].ce is not None and weighted[0].ce is not None
    assert torch.equal(plain[0].ce, weighted[0].ce)
    assert plain[0].kd != weighted[0].kd and plain[0].conf_w is None
    raw = [max(reference.softmax(position)) ** 2 for position in step.teacher.tolist()]
    assert float(weighted[0].conf_w or 0) == pytest.approx(sum(raw) / len(raw))
    # Not from the targets, which are softened; float16 as cached moves little.
    totals = totals_of(step.top1_log_prob.half(), 2.0, labeled=True)
    config = ObjectiveConfig(conf_power=2.0)
    cached = distillation_objective(
        step.student,
        targets_of(step, config, "sparse"),
        step.next_ids,
        config=config,
        totals=totals,
        top1_log_prob=step.top1_log_prob.half(),
    )
    torch.testing.assert_close(cached.kd, weighted[0].kd, rtol=2e-3, atol=0)


def test_conf_power_0_gives_the_bits_of_no_weighting() -> None:
    step, config = make_step(5, 6, 0, gaps=0.0), ObjectiveConfig(alpha=1.0)
    terms, gradient = run(step, config, [])
    leaf = step.student.clone().requires_grad_()
    plain = 1.0 * 2.0**2 * (divergence(leaf, top_k(step.teacher, K, 2.0)).sum() / 6)
    plain.backward()
    assert torch.equal(terms[0].loss, plain) and leaf.grad is not None
    assert torch.equal(gradient, leaf.grad)


def test_label_smoothing_touches_the_cross_entropy_only() -> None:
    step = make_step(6, 8, 5)
    plain, _ = run(step, ObjectiveConfig(unlabeled_alpha=0.3), [])
    smooth, _ = run(step, ObjectiveConfig(unlabeled_alpha=0.3, label_smoothing=0.2), [])
    assert torch.equal(plain[0].kd, smooth[0].kd) and plain[0].ce != smooth[0].ce
    assert torch.equal(plain[1].loss, smooth[1].loss) and smooth[1].ce is None


def test_drawn_targets_estimate_forward_kl_and_are_a_head_for_the_others() -> None:
    step = make_step(7, 8, 0, gaps=0.0)
    for name in ("kl", "jsd"):
        config = ObjectiveConfig(divergence=name)
        targets = targets_of(step, config, "sampled")
        assert isinstance(targets, SampledTargets)
        terms, _ = run(step, config, [], "sampled")
        if name == "kl":
            expected = sampled_kl(step.student, targets)
        else:
            expected = divergence(step.student, targets.coarse(), chosen_measure(config))
        torch.testing.assert_close(terms[0].kd, expected.mean())
        assert terms[0].agreement is None
        torch.testing.assert_close(terms[0].effective_draws, targets.num_effective().mean())
    terms, _ = run(step, ObjectiveConfig(), [], "sparse")
    assert terms[0].effective_draws is None
    agree = step.student.argmax(-1) == step.teacher.argmax(-1)
    assert float(terms[0].agreement or 0) == pytest.approx(float(agree.double().mean()))


def test_the_support_is_the_teachers_business() -> None:
    step = make_step(8, 6, 0, gaps=0.0)
    config = ObjectiveConfig(alpha=1.0)
    support = torch.arange(VOCAB) < 7
    step.teacher[:, 7:] = -math.inf
    step.next_ids %= 7
    inside, gradient = run(step, config, [], support=support)
    cut = replace(step, student=step.student[:, :7], teacher=step.teacher[:, :7])
    alone, alone_gradient = run(cut, config, [])
    torch.testing.assert_close(inside[0].kd, alone[0].kd)
    torch.testing.assert_close(gradient[:, :7], alone_gradient)
    assert (gradient[:, 7:] == 0).all()
    # The cross-entropy pushes them down.
    _, gradient = run(step, ObjectiveConfig(alpha=0.0), [], support=support)
    assert (gradient[:, 7:] > 0).all()


@pytest.mark.parametrize("kind", ["dense", "sparse", "sampled"])
@pytest.mark.parametrize("name", get_args(DivergenceName))
def test_ids_that_both_exclude_give_no_nan(kind: str, name: DivergenceName) -> None:
    step = make_step(9, 6, 5)
    step.student[:, 3] = step.teacher[:, 3] = -math.inf
    step.next_ids[step.next_ids == 3] = 4
    config = ObjectiveConfig(divergence=name, unlabeled_alpha=0.3, conf_power=1.0)
    terms, gradient = run(step, config, [2, 8], kind)
    assert all(term.loss.isfinite() for term in terms)
    assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()


def test_positions_without_a_teacher_and_without_a_next_token_cost_nothing() -> None:
    step = make_step(10, 4, 0)
    step.has_teacher[:] = False
    step.next_ids[:] = NO_LABEL
    for conf_power in (0.0, 1.0):
        terms, gradient = run(step, ObjectiveConfig(conf_power=conf_power), [])
        assert terms[0].loss == 0 and (gradient == 0).all()


def test_refuses_what_does_not_fit() -> None:
    step = make_step(11, 4, 0, gaps=0.0)
    config = ObjectiveConfig(conf_power=1.0)
    fits: dict[str, Any] = {
        "student_logits": step.student,
        "targets": targets_of(step, config, "sparse"),
        "labels": step.next_ids,
        "config": config,
        "totals": totals_of(step.top1_log_prob, 1.0, labeled=True),
        "top1_log_prob": step.top1_log_prob,
    }
    distillation_objective(**fits)
    other = targets_of(step, ObjectiveConfig(temperature=3.0), "sparse")
    changes: dict[str, Any]
    for changes, saying in (
        ({"labels": step.next_ids[:3]}, r"labels of shape \(3,\)"),
        ({"has_teacher": torch.ones(4, 1)}, r"has_teacher of shape \(4, 1\)"),
        ({"targets": other}, "targets are at temperature 3.0, the objective at 2.0"),
        ({"top1_log_prob": None}, "top1_log_prob is needed"),
        ({"totals": StepTotals(num_labeled=3)}, "a batch of 4 in a step that counts 3"),
        ({"labels": None}, "unlabeled_alpha is 0"),
    ):
        with pytest.raises(ValueError, match=saying):
            distillation_objective(**(fits | changes))
    with pytest.raises(UserError, match="lower --conf-power"):
        step.teacher[:] = 0.0
        run(step, ObjectiveConfig(conf_power=1e4), [])
