"""What labels and numbers cost, against loops over samples and labels, however a step is cut."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.heads import HEADS
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import (
    OutputLoss,
    StepTotals,
    confidence_weights,
    loss_of,
)
from tests import reference_losses as reference

SEVERAL = loss_of(HEADS["multi_label_classification"])
NUMBER = loss_of(HEADS["regression"])


def of_step(
    loss: OutputLoss,
    parts: list[tuple[Tensor, Tensor, Tensor | None]],
    config: ObjectiveConfig,
) -> Tensor:
    """The loss of a step, a micro-batch at a time."""
    totals = StepTotals()
    for _, teacher, labels in parts:
        weights = None
        if config.conf_power:
            weights = confidence_weights(loss.top1_log_prob(teacher), config.conf_power)
        num_labels = None if labels is None else int(loss.has_label(labels).sum())
        totals += StepTotals.of(
            len(teacher), labeled=labels is not None, num_labels=num_labels, conf_weights=weights
        )
    shares = [
        loss.objective(student, teacher, labels, config=config, totals=totals).loss
        for student, teacher, labels in parts
    ]
    return torch.stack(shares).sum()


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 7),
    num_unlabeled=st.integers(0, 4),
    num_labels=st.integers(1, 4),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    conf_power=st.sampled_from([0.0, 2.0]),
    cut=st.integers(0, 7),
)
def test_labels_cost_what_loops_say(
    seed: int, num: int, num_unlabeled: int, num_labels: int, temperature: float, alpha: float,
    smoothing: float, conf_power: float, cut: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shape = (num + num_unlabeled, num_labels)
    student = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (num, num_labels), generator=generator)
    labels[torch.rand(num, generator=generator) < 0.3] = NO_LABEL
    config = ObjectiveConfig(
        alpha=alpha, temperature=temperature, label_smoothing=smoothing, conf_power=conf_power,
        unlabeled_alpha=0.7,
    )  # fmt: skip
    edges = sorted({0, min(cut, num), num})
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (student[i:j], teacher[i:j], labels[i:j]) for i, j in pairwise(edges)
    ]
    if num_unlabeled:
        parts.append((student[num:], teacher[num:], None))
    found = of_step(SEVERAL, parts, config)
    found.backward()

    def divergences(i: int) -> float:
        pairs = zip(teacher[i].tolist(), student[i].tolist(), strict=True)
        return sum(reference.binary_kl(t, s, temperature) for t, s in pairs) / num_labels

    def weight(i: int) -> float:
        answers = [reference.log_sigmoid(abs(t)) for t in teacher[i].tolist()]
        return math.exp(conf_power * sum(answers) / num_labels)

    def distilled(kind: range) -> float:
        total = sum(weight(i) for i in kind)
        return sum(weight(i) * divergences(i) for i in kind) / total if kind else 0.0

    known = [i for i in range(num) if NO_LABEL not in labels[i].tolist()]
    hard = [
        reference.binary_cross_entropy(s, y * (1 - smoothing) + smoothing / 2) / num_labels
        for i in known
        for s, y in zip(student[i].tolist(), labels[i].tolist(), strict=True)
    ]
    expected = alpha * temperature**2 * distilled(range(num))
    expected += (1 - alpha) * sum(hard) / max(1, len(known))
    expected += 0.7 * temperature**2 * distilled(range(num, num + num_unlabeled))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    assert student.grad is not None
    kinds = {i: range(num) if i < num else range(num, num + num_unlabeled) for i in range(shape[0])}
    for i, kind in kinds.items():
        share = weight(i) / sum(weight(j) for j in kind)
        share *= temperature**2 * (alpha if i < num else 0.7)
        for label in range(num_labels):
            t, s = teacher[i, label].item(), student[i, label].item()
            apart = reference.sigmoid(s / temperature) - reference.sigmoid(t / temperature)
            wanted = share * apart / temperature / num_labels
            if i in known:
                y = labels[i, label].item() * (1 - smoothing) + smoothing / 2
                wanted += (1 - alpha) * (reference.sigmoid(s) - y) / num_labels / len(known)
            assert student.grad[i, label].item() == pytest.approx(wanted, rel=1e-8, abs=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), num=st.integers(1, 7), alpha=st.sampled_from([0.0, 0.4, 1.0]))
def test_a_number_costs_its_squared_distances(seed: int, num: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num, 1, generator=generator, dtype=torch.float64).requires_grad_()
    teacher, labels = torch.randn(2, num, generator=generator, dtype=torch.float64)
    labels[torch.rand(num, generator=generator) < 0.3] = torch.nan
    config = ObjectiveConfig(alpha=alpha)  # whose temperature is 2, and of no account
    edges = sorted({0, num // 2, num})
    found = of_step(
        NUMBER,
        [(student[i:j], teacher[i:j, None], labels[i:j]) for i, j in pairwise(edges)],
        config,
    )
    found.backward()
    known = (~labels.isnan()).nonzero()[:, 0].tolist()
    s, t, y = student[:, 0].tolist(), teacher.tolist(), labels.tolist()
    expected = alpha * sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / num
    expected += (1 - alpha) * sum((s[i] - y[i]) ** 2 for i in known) / max(1, len(known))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert student.grad is not None
    for i in range(num):
        wanted = 2 * alpha * (s[i] - t[i]) / num
        wanted += 2 * (1 - alpha) * (s[i] - y[i]) / len(known) if i in known else 0.0
        assert student.grad[i].item() == pytest.approx(wanted, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("divergence", ["kl", "reverse-kl", "jsd", "skew-kl", "tv"])
def test_each_divergence_compares_two_outcomes_a_label(divergence: str) -> None:
    teacher, student = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    config = ObjectiveConfig.model_validate({"divergence": divergence, "alpha": 1.0})
    totals = StepTotals.of(5, labeled=False)
    found = SEVERAL.objective(
        student, teacher, None, config=config.model_copy(update={"unlabeled_alpha": 1.0}),
        totals=totals,
    ).kd  # fmt: skip
    both = [
        [reference.sigmoid(one / 2) for one in side.flatten().tolist()]
        for side in (teacher, student)
    ]
    expected = [
        reference.divergence_of(divergence, [p, 1 - p], [q, 1 - q])
        for p, q in zip(*both, strict=True)
    ]
    assert found.item() == pytest.approx(sum(expected) / 15, rel=1e-6)


def test_logits_beyond_any_text_stay_finite() -> None:
    teacher = torch.tensor([[1e4, -1e4]])
    student = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    totals = StepTotals.of(1, labeled=True)
    terms = SEVERAL.objective(
        student, teacher, torch.tensor([[1, 0]]), config=ObjectiveConfig(), totals=totals
    )
    terms.loss.backward()
    assert terms.loss.isfinite() and student.grad is not None and student.grad.isfinite().all()
    assert terms.agreement == 0


@pytest.mark.parametrize("name", ["multi_label_classification", "regression"])
def test_labels_cost_what_they_cost_in_transformers(name: str) -> None:
    """So that a student in transformers goes on with the loss it was trained on."""
    generator = torch.Generator().manual_seed(1)
    num_outputs = 1 if name == "regression" else 4
    logits = torch.randn(6, num_outputs, generator=generator)
    labels = torch.randint(0, 2, (6, num_outputs), generator=generator).float()
    labels = labels[:, 0] if name == "regression" else labels

    class Config:
        problem_type = name
        num_labels = num_outputs

    theirs = ForSequenceClassificationLoss(labels, logits, Config())
    ours = loss_of(HEADS[name]).hard(logits, labels).mean()
    torch.testing.assert_close(ours, theirs)
