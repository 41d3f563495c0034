"""What a classifier's outputs cost to learn, by the kind of its head (`stages/heads.py`).

One of several classes is compared as a distribution over them. Each of several labels is an outcome
of two, and a sample costs the mean over its labels: binary divergences at the temperature, with T^2
outside as for classes (the gradient of one label's term falls with T^2 likewise), and binary
cross-entropies (Yang et al. 2023, arXiv:2308.06453, which sums them). A number costs
its squared distance from the teacher's and from the label, without a temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.heads import Head, MultiLabel, Regression, SingleLabel
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution, widened
from teacher_cache.stages.losses.divergences import chosen_measure
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    distillation_objective,
    objective_of_distances,
    top1_log_prob,
)


class OutputLoss(ABC):
    """What outputs [B, C] of one kind cost."""

    @abstractmethod
    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """[B] nats at T = 1, by which `conf_power` weighs a sample.

        Raises:
            ValueError: where outputs are no probabilities.
        """

    @abstractmethod
    def has_label(self, labels: Tensor) -> Tensor:
        """[B] bool, of a batch's labels."""

    @abstractmethod
    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """[B] costs of labels, all of which are there."""

    def hard_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of what labels cost."""
        return self.hard(logits, labels).sum()

    @abstractmethod
    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """One micro-batch's share of the optimizer step's loss.

        Args:
            logits: [B, C] of the student; carry the gradient.
            teacher_logits: [B, C].
            labels: [B, ...] as the head's `batched` has them; None of an unlabelled batch.
            config: weights and temperature.
            totals: of the whole optimizer step.
        """


class OneOfSeveral(OutputLoss):
    """Classes: `distillation_objective`."""

    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """Of the teacher's class."""
        return top1_log_prob(teacher_logits)

    def has_label(self, labels: Tensor) -> Tensor:
        """A class."""
        return labels != NO_LABEL

    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropies."""
        return F.cross_entropy(
            widened(logits), labels, reduction="none", label_smoothing=label_smoothing
        )

    def hard_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As torch adds them up, whose last place differs from that of a sum behind."""
        return F.cross_entropy(widened(logits), labels, reduction="sum")

    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """On the cached logits, at any temperature."""
        return distillation_objective(
            logits,
            TeacherDistribution.from_logits(teacher_logits, config.temperature),
            labels,
            config=config,
            totals=totals,
            top1_log_prob=self.top1_log_prob(teacher_logits) if config.conf_power else None,
        )


class AnyOfSeveral(OutputLoss):
    """Labels, each there or not."""

    @torch.no_grad()
    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """Of the teacher's answer to each label, mean over labels."""
        return F.logsigmoid(widened(teacher_logits).abs()).mean(dim=-1)

    def has_label(self, labels: Tensor) -> Tensor:
        """What labels a sample has is known for all of them or none."""
        return (labels != NO_LABEL).all(dim=-1)

    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Binary cross-entropies, mean over labels; smoothed ones lie between 0 and 1."""
        wide = widened(logits)
        smoothed = labels.to(wide.dtype) * (1 - label_smoothing) + label_smoothing / 2
        costs = F.binary_cross_entropy_with_logits(wide, smoothed, reduction="none")
        return costs.mean(dim=-1)

    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """The chosen divergence of two outcomes, mean over labels."""
        totals.check_covers(len(logits), labeled=labels is not None)
        log_p, log_q = (_of_two(one, config.temperature) for one in (teacher_logits, logits))
        weights = self.top1_log_prob(teacher_logits) if config.conf_power else None
        agrees = ((logits > 0) == (teacher_logits > 0)).float().mean(dim=-1)
        return objective_of_distances(
            chosen_measure(config)(log_p, log_q).mean(dim=-1),
            _costs_of_known(self, logits, labels, config.label_smoothing),
            agrees,
            None,
            config=config,
            totals=totals,
            top1_log_prob=weights,
        )


class ANumber(OutputLoss):
    """A number a sample, the only output."""

    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """A number has none."""
        raise ValueError("a number has no probability to weigh it by")

    def has_label(self, labels: Tensor) -> Tensor:
        """A number."""
        return ~labels.isnan()

    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Squared errors."""
        wide = widened(logits).squeeze(-1)
        return (wide - labels.to(wide.dtype)).square()

    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """Squared distances from the teacher's number."""
        totals.check_covers(len(logits), labeled=labels is not None)
        plain = config.model_copy(update={"temperature": 1.0})  # numbers are not softened
        return objective_of_distances(
            (widened(logits) - teacher_logits).square().squeeze(-1),
            _costs_of_known(self, logits, labels, 0.0),
            None,
            None,
            config=plain,
            totals=totals,
            top1_log_prob=None,
        )


def _of_two(logits: Tensor, temperature: float) -> Tensor:
    """[B, C, 2] log-probs that a label is there, and that it is not; nats."""
    scaled = widened(logits) / temperature
    return torch.stack([F.logsigmoid(scaled), F.logsigmoid(-scaled)], dim=-1)


def _costs_of_known(
    loss: OutputLoss, logits: Tensor, labels: Tensor | None, label_smoothing: float
) -> Tensor | None:
    """[B], 0 where there is no label; None of an unlabelled batch."""
    if labels is None:
        return None
    is_known = loss.has_label(labels)
    costs = loss.hard(logits[is_known], labels[is_known], label_smoothing=label_smoothing)
    return costs.new_zeros(len(labels)).masked_scatter(is_known, costs)


LOSSES: Mapping[str, OutputLoss] = MappingProxyType(
    {
        SingleLabel.name: OneOfSeveral(),
        MultiLabel.name: AnyOfSeveral(),
        Regression.name: ANumber(),
    }
)


def loss_of(head: Head) -> OutputLoss:
    """What outputs of this kind cost."""
    return LOSSES[head.name]
