"""What a micro-batch teaches, against loops over samples, however a step is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import divergence
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    distillation_objective,
    smoothed_cross_entropy,
)
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.terms import Heard, NextTokens, PooledStates, Term
from teacher_cache.stages.training.views import SamplesView
from tests import reference_losses as reference


@dataclass
class Step:
    """One optimizer step's samples, float64; the first `num_labeled` of them are labelled.

    `next_tokens` are the cross-entropies of each sample's next tokens, from none to three; `pooled`
    the student's pooled states (projected) and the teacher's.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    num_labeled: int
    next_tokens: list[list[float]]
    pooled: tuple[Tensor, Tensor]

    def batches(self, borders: list[int]) -> list[tuple[slice, bool]]:
        """The step cut at `borders` and where its kinds meet."""
        edges = sorted({0, self.num_labeled, len(self.student), *borders})
        return [(slice(start, end), end <= self.num_labeled) for start, end in pairwise(edges)]


def make_step(seed: int, num_labeled: int, num_unlabeled: int, num_classes: int = 3) -> Step:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_labeled + num_unlabeled, num_classes)
    return Step(
        student=2 * torch.randn(shape, generator=generator, dtype=torch.float64),
        teacher=3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        labels=torch.randint(num_classes, shape[:1], generator=generator),
        num_labeled=num_labeled,
        next_tokens=[
            torch.rand(idx % 4, generator=generator, dtype=torch.float64).tolist()
            for idx in range(shape[0])
        ],
        pooled=(
            torch.randn(shape[0], 5, generator=generator, dtype=torch.float64),
            10 * torch.randn(shape[0], 5, generator=generator, dtype=torch.float64),
        ),
    )


@dataclass
class Student:
    """Answers a batch whose ids are those of the step's samples."""

    step: Step
    logits: Tensor
    projected: Tensor

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **requests: bool) -> Any:
        idxs = input_ids[:, 0]
        tokens = [one for idx in idxs.tolist() for one in self.step.next_tokens[idx]]
        return SimpleNamespace(
            logits=self.logits[idxs],
            projected=self.projected[idxs],
            next_token_loss_sum=torch.tensor(sum(tokens), dtype=torch.float64)
            if requests.get("next_token_loss")
            else None,
        )

    def num_next_tokens(self, attention_mask: Tensor) -> int:
        return int(attention_mask.sum())


@dataclass
class Terms:
    """One micro-batch's."""

    loss: Tensor
    core: ObjectiveTerms
    beside: dict[str, Tensor]


def batch_of(step: Step, where: slice, labeled: bool) -> dict[str, Tensor]:
    idxs = torch.arange(len(step.student))[where]
    batch = {
        "input_ids": idxs[:, None],
        "attention_mask": torch.tensor([[len(step.next_tokens[idx])] for idx in idxs.tolist()]),
        "teacher_logits": step.teacher[where],
        "teacher_pooled": step.pooled[1][where],
    }
    return batch | {"labels": step.labels[where]} if labeled else batch


def lesson_of(config: ObjectiveConfig) -> Lesson:
    terms: list[Term] = []
    if config.lm_weight:
        terms.append(NextTokens(weight=config.lm_weight))
    if config.pooled_weight:
        terms.append(PooledStates(weight=config.pooled_weight))
    return Lesson(view=SamplesView(), objective=config, terms=terms)


def run(
    step: Step, config: ObjectiveConfig, borders: list[int], *, pooled_leaf: Tensor | None = None
) -> tuple[list[Terms], Tensor]:
    """Terms of every micro-batch, and the step's accumulated gradient.

    That of `pooled_leaf`, which stands for the student's pooled states, is added to it.
    """
    leaf = step.student.clone().requires_grad_()
    student: Any = Student(step, leaf, step.pooled[0] if pooled_leaf is None else pooled_leaf)
    lesson = lesson_of(config)
    batches = [batch_of(step, where, labeled) for where, labeled in step.batches(borders)]
    counted = (lesson.totals(student, batch, lesson.terms) for batch in batches)
    totals = sum(counted, StepTotals())
    terms = []
    for batch in batches:
        heard = lesson.heard(student, student, batch, terms=lesson.terms, step=0)
        core = lesson.core(heard, totals)
        shares = [term.share(heard, totals) for term in lesson.terms]
        loss = lesson.loss(core, shares, lesson.terms, step=0)
        loss.backward()
        beside = {share.name: share.value for share in shares}
        terms.append(Terms(loss=loss, core=core, beside=beside))
    assert leaf.grad is not None
    return terms, leaf.grad


def total(terms: list[Terms]) -> float:
    return sum(term.loss.item() for term in terms)


configs = st.builds(
    ObjectiveConfig,
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    conf_power=st.sampled_from([0.0, 0.5, 2.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    unlabeled_alpha=st.floats(0.01, 2),
    lm_weight=st.sampled_from([0.0, 0.5, 2.0]),
    pooled_weight=st.sampled_from([0.0, 0.5, 3.0]),
)
measures = st.one_of(
    st.sampled_from([{"divergence": name} for name in ("kl", "reverse-kl", "tv")]),
    st.builds(lambda beta: {"divergence": "jsd", "jsd_beta": beta}, st.floats(0.01, 0.99)),
    st.builds(lambda a: {"divergence": "skew-kl", "skew_alpha": a}, st.floats(0.01, 0.99)),
)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    num_labeled=st.integers(1, 9),
    num_unlabeled=st.integers(0, 9),
    borders=st.lists(st.integers(1, 17), max_size=6),
    config=configs,
    measure=measures,
)
def test_no_way_of_cutting_the_step_changes_it(
    seed: int,
    num_labeled: int,
    num_unlabeled: int,
    borders: list[int],
    config: ObjectiveConfig,
    measure: dict[str, Any],
) -> None:
    config = config.model_copy(update=measure)
    step = make_step(seed, num_labeled, num_unlabeled)
    inside = [border for border in borders if border < num_labeled + num_unlabeled]
    leaves = [step.pooled[0].clone().requires_grad_() for _ in range(2)]
    whole, whole_gradient = run(step, config, [], pooled_leaf=leaves[0])
    parts, gradient = run(step, config, inside, pooled_leaf=leaves[1])
    assert total(parts) == pytest.approx(total(whole), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-9, atol=1e-12)
    labeled = [term for term in parts if term.core.ce is not None]
    assert sum(float(term.core.kd) for term in labeled) == pytest.approx(float(whole[0].core.kd))
    agreements = [float(term.core.agreement or 0) for term in labeled]
    assert sum(agreements) == pytest.approx(float(whole[0].core.agreement or 0), abs=1e-6)

    labels: list[int | None] = list(step.labels[:num_labeled].tolist())
    pairs = list(zip(*(states.tolist() for states in step.pooled), strict=True))
    expected = reference.objective(
        step.student.tolist(),
        step.teacher.tolist(),
        labels + [None] * num_unlabeled,
        **config.model_dump(),
        next_token_losses=step.next_tokens,
        pooled=pairs,
    )
    if config.pooled_weight:
        share = -config.pooled_weight / len(pairs)
        expected_gradient = [
            [share * one for one in reference.cosine_gradient(s, t)] for s, t in pairs
        ]
        assert leaves[1].grad is not None
        torch.testing.assert_close(
            leaves[1].grad, torch.tensor(expected_gradient).double(), rtol=1e-6, atol=1e-8
        )
    assert total(parts) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conf_power_0_gives_the_bits_of_no_weighting(labeled: bool, dtype: torch.dtype) -> None:
    step = make_step(1, 7, 0)
    config = ObjectiveConfig(alpha=0.7, conf_power=0.0, unlabeled_alpha=0.3)
    student = step.student.to(dtype).requires_grad_()
    teacher = step.teacher.to(dtype)
    labels = step.labels if labeled else None
    # Weight sums that would spoil the result if anything read them.
    totals = StepTotals(
        num_labeled=7,
        num_unlabeled=7,
        num_labels=7,
        conf_weight_sum_labeled=math.nan,
        conf_weight_sum_unlabeled=math.nan,
    )
    targets = TeacherDistribution.from_logits(teacher, 2.0)
    terms = distillation_objective(student, targets, labels, config=config, totals=totals)
    (gradient,) = torch.autograd.grad(terms.loss, student)

    kd = divergence(student, TeacherDistribution.from_logits(teacher, 2.0)).sum() / 7
    plain = (0.7 if labeled else 0.3) * 2.0**2 * kd
    if labeled:
        ce = smoothed_cross_entropy(student, step.labels, label_smoothing=0.0).sum() / 7
        plain = plain + (1 - 0.7) * ce
    (plain_gradient,) = torch.autograd.grad(plain, student)
    assert torch.equal(terms.loss, plain)
    assert torch.equal(gradient, plain_gradient)
    assert terms.conf_w is None


def test_confidence_weights_touch_the_distillation_term_only() -> None:
    step = make_step(2, 8, 0)
    plain, _ = run(step, ObjectiveConfig(), [])
    weighted, _ = run(step, ObjectiveConfig(conf_power=2.0), [])
    assert plain[0].core.ce is not None
    assert weighted[0].core.ce is not None
    assert weighted[0].core.conf_w is not None
    assert torch.equal(plain[0].core.ce, weighted[0].core.ce)
    assert plain[0].core.kd != weighted[0].core.kd
    raw = [max(reference.softmax(sample)) ** 2 for sample in step.teacher.tolist()]
    assert float(weighted[0].core.conf_w) == pytest.approx(sum(raw) / len(raw))


def test_equal_confidences_weigh_nothing() -> None:
    step = make_step(3, 8, 0)
    step.teacher = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]] * 4, dtype=torch.float64)
    plain, _ = run(step, ObjectiveConfig(), [])
    weighted, _ = run(step, ObjectiveConfig(conf_power=3.0), [])
    assert total(plain) == pytest.approx(total(weighted), rel=1e-12)


def test_weights_of_one_kind_are_not_normalised_by_the_other() -> None:
    step = make_step(4, 5, 5)
    config = ObjectiveConfig(conf_power=2.0, unlabeled_alpha=0.3)
    alone, _ = run(make_step(4, 5, 5), config, [])
    step.teacher[5:] *= 10  # far more confident unlabelled samples
    beside, _ = run(step, config, [])
    assert torch.equal(alone[0].loss, beside[0].loss)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing_touches_the_cross_entropy_only(smoothing: float) -> None:
    step = make_step(5, 6, 4)
    plain, _ = run(step, ObjectiveConfig(unlabeled_alpha=0.3), [])
    smooth, _ = run(step, ObjectiveConfig(unlabeled_alpha=0.3, label_smoothing=smoothing), [])
    assert torch.equal(plain[0].core.kd, smooth[0].core.kd)
    assert plain[0].core.ce is not None
    assert smooth[0].core.ce is not None
    assert plain[0].core.ce != smooth[0].core.ce
    assert torch.equal(plain[1].loss, smooth[1].loss)
    pairs = zip(step.student[:6].tolist(), step.labels[:6].tolist(), strict=True)
    expected = [reference.cross_entropy(sample, label, smoothing) for sample, label in pairs]
    assert float(smooth[0].core.ce) == pytest.approx(sum(expected) / 6)


def test_unlabelled_samples_have_no_cross_entropy() -> None:
    step = make_step(6, 0, 6)
    terms, _ = run(step, ObjectiveConfig(unlabeled_alpha=0.3), [])
    assert terms[0].core.ce is None
    assert terms[0].loss.item() == pytest.approx(0.3 * 4 * float(terms[0].core.kd))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_term_of_weight_0_is_left_out_however_bad(bad: float) -> None:
    step = make_step(7, 6, 0)
    labels_only, labels_gradient = run(step, ObjectiveConfig(alpha=0), [])
    teacher_only, teacher_gradient = run(step, ObjectiveConfig(alpha=1), [])

    clean = step.teacher.clone()
    step.teacher[2] = bad  # NaN log-probs
    terms, gradient = run(step, ObjectiveConfig(alpha=0), [])
    assert terms[0].core.kd.isnan()
    assert torch.equal(terms[0].loss, labels_only[0].loss)
    assert torch.equal(gradient, labels_gradient)

    # An infinite cross-entropy on one label, where the teacher excludes the class too.
    step.teacher = clean
    step.student[0, step.labels[0]] = step.teacher[0, step.labels[0]] = -math.inf
    terms, gradient = run(step, ObjectiveConfig(alpha=1), [])
    assert terms[0].core.ce is not None
    assert terms[0].core.ce.isinf()
    assert terms[0].loss.isfinite()
    assert gradient.isfinite().all()
    assert torch.equal(gradient[1:], teacher_gradient[1:])
    assert teacher_only[0].loss.isfinite()


def test_next_tokens_are_a_mean_over_positions_of_both_kinds() -> None:
    step = make_step(8, 5, 4)
    config = ObjectiveConfig(unlabeled_alpha=0.3, lm_weight=0.7)
    plain, plain_gradient = run(step, config.model_copy(update={"lm_weight": 0.0}), [])
    terms, gradient = run(step, config, [2, 7])
    positions = [one for sample in step.next_tokens for one in sample]
    means = [term.beside["lm"] for term in terms]
    assert len(means) == len(terms) == 4
    assert float(sum(means)) == pytest.approx(sum(positions) / len(positions))
    assert total(terms) == pytest.approx(total(plain) + 0.7 * float(sum(means)))
    assert [term.beside for term in plain] == [{}, {}]
    torch.testing.assert_close(gradient, plain_gradient)


def test_the_next_token_loss_carries_its_gradient() -> None:
    config = ObjectiveConfig(lm_weight=0.7)
    lesson = lesson_of(config)
    loss_sum = torch.tensor(30.0, requires_grad=True)
    batch = batch_of(make_step(8, 4, 0), slice(0, 4), True)
    outputs = SimpleNamespace(next_token_loss_sum=loss_sum)
    student: Any = None
    heard = Heard(student=student, outputs=outputs, batch=batch, positions=None, step=0)
    (term,) = lesson.terms
    share = term.share(heard, StepTotals(num_labeled=4, num_next_tokens=20))
    (share.weight * share.value).backward()
    assert loss_sum.grad is not None and float(loss_sum.grad) == pytest.approx(0.7 / 20)
    # Samples of one token have no next ones.
    outputs.next_token_loss_sum = torch.tensor(0.0)
    assert term.share(heard, StepTotals(num_labeled=4)).value == 0


def test_the_pooled_distance_is_a_mean_over_samples_of_both_kinds() -> None:
    step = make_step(12, 5, 4)
    # Neither T^2 nor the confidence weights touch it.
    config = ObjectiveConfig(unlabeled_alpha=0.3, conf_power=2.0, temperature=4.0)
    plain, _ = run(step, config, [])
    terms, _ = run(step, config.model_copy(update={"pooled_weight": 0.7}), [2, 7])
    mean = sum(float(term.beside["pooled"]) for term in terms)
    pairs = zip(*(states.tolist() for states in step.pooled), strict=True)
    assert mean == pytest.approx(sum(1 - reference.cosine(s, t) for s, t in pairs) / 9)
    assert total(terms) == pytest.approx(total(plain) + 0.7 * mean)
    assert [term.beside for term in plain] == [{}, {}]


def test_agreement_counts_equal_choices() -> None:
    step = make_step(8, 4, 0)
    step.teacher = step.student.clone()
    step.teacher[0] = step.student[0].roll(1)
    terms, _ = run(step, ObjectiveConfig(), [])
    assert float(terms[0].core.agreement or 0) == 0.75


def test_defaults_are_those_of_the_design() -> None:
    assert ObjectiveConfig().model_dump() == {
        "alpha": 0.5,
        "temperature": 2.0,
        "divergence": "kl",
        "jsd_beta": 0.5,
        "skew_alpha": 0.1,
        "conf_power": 0.0,
        "label_smoothing": 0.0,
        "unlabeled_alpha": 0.0,
        "lm_weight": 0.0,
        "pooled_weight": 0.0,
    }
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    default = smoothed_cross_entropy(logits, labels)
    assert torch.equal(default, smoothed_cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", math.nan),
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("conf_power", -1.0),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("unlabeled_alpha", -0.3),
        ("unlabeled_alpha", math.inf),
        ("lm_weight", -0.1),
        ("lm_weight", math.inf),
        ("pooled_weight", -0.1),
        ("pooled_weight", math.nan),
        ("divergence", "KL"),
        ("jsd_beta", 0.0),
        ("jsd_beta", 1.0),
        ("skew_alpha", 0.0),
        ("skew_alpha", 1.0),
        ("alhpa", 0.5),
    ],
)
def test_config_refuses(field: str, value: float | str) -> None:
    with pytest.raises(ValidationError, match=field):
        ObjectiveConfig.model_validate({field: value})


def test_a_parameter_goes_with_its_divergence() -> None:
    assert ObjectiveConfig(divergence="jsd", jsd_beta=0.9).jsd_beta == 0.9
    assert ObjectiveConfig(divergence="kl", jsd_beta=0.5).divergence == "kl"  # says nothing new
    for fields, saying in (
        ({"divergence": "tv", "jsd_beta": 0.9}, "--jsd-beta 0.9 is of --divergence jsd.* is tv"),
        ({"skew_alpha": 0.3}, "--skew-alpha 0.3 is of --divergence skew-kl.* is kl"),
    ):
        with pytest.raises(ValidationError, match=saying):
            ObjectiveConfig.model_validate(fields)


def test_a_conf_power_that_leaves_no_weight_is_the_users_error() -> None:
    step = make_step(11, 4, 0)
    step.teacher = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="lower --conf-power"):
        run(step, ObjectiveConfig(conf_power=1e4), [])
