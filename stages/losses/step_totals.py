"""What an optimizer step holds: the counts and sums that its terms are means over."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.distributions import widened


@torch.no_grad()
def top1_log_prob(teacher_logits: Tensor) -> Tensor:
    """Log-prob of the teacher's most probable outcome at T = 1.

    Args:
        teacher_logits: [..., C], before temperature.

    Returns:
        [...] nats, float32 or wider, without gradient.
    """
    return torch.log_softmax(widened(teacher_logits), dim=-1).amax(dim=-1)


@torch.no_grad()
def confidence_weights(top1_log_prob: Tensor, conf_power: float) -> Tensor:
    """Raw weights, `max_c p(c) ** conf_power` at T = 1, whatever the distillation temperature.

    Raw: the objective divides them by their mean over the optimizer step. At `conf_power` 0 every
    weight is 1, but a product with 1 and a division by a sum of ones need not give the same bits
    as no weighting, so callers skip the weighting instead of calling this.

    Args:
        top1_log_prob: [...] nats, of the full distribution; float16 as cached will do.
        conf_power: at least 0.

    Returns:
        [...] in (0, 1], float32 or wider, without gradient.

    Raises:
        ValueError: if `conf_power` is negative.
    """
    if conf_power < 0:
        raise ValueError(f"conf_power is {conf_power}, but must be at least 0")
    return (conf_power * widened(top1_log_prob)).exp()


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What one optimizer step holds, over all its micro-batches and ranks.

    Known from the cache before the step's first backward. Totals of parts add up:
    `sum((StepTotals.of(...), ...), StepTotals())`, and an all-reduce of these numbers.

    What is counted are positions at which a teacher spoke: one in each of a classifier's samples.

    Attributes:
        num_labeled: those of the corpus whose labels are learned, too.
        num_unlabeled: those of others.
        conf_weight_sum_labeled: sum of the labelled ones' raw confidence weights; unused when
            `conf_power` is 0.
        conf_weight_sum_unlabeled: the same for the unlabelled ones.
        num_labels: positions that have a label to learn, a class or a next token; of the labelled
            kind, with a teacher or without.
        num_next_tokens: tokens of both kinds that a classifier predicts besides.
        num_attention_rows: rows of attention maps that are matched, over all layers, of both kinds.
        num_hidden_states: hidden states that are matched, over all layers, of both kinds.
        num_chunks_labeled: chunks of text whose likelihoods are compared, in labelled samples.
        num_chunks_unlabeled: the same in unlabelled ones.
    """

    num_labeled: int = 0
    num_unlabeled: int = 0
    conf_weight_sum_labeled: float = 0.0
    conf_weight_sum_unlabeled: float = 0.0
    num_labels: int = 0
    num_next_tokens: int = 0
    num_attention_rows: int = 0
    num_hidden_states: int = 0
    num_chunks_labeled: int = 0
    num_chunks_unlabeled: int = 0

    def __add__(self, other: StepTotals) -> StepTotals:
        """The totals of both parts together."""
        names = [one.name for one in fields(self)]
        return StepTotals(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def of(
        cls,
        num: int,
        *,
        labeled: bool,
        num_labels: int | None = None,
        conf_weights: Tensor | None = None,
    ) -> StepTotals:
        """The totals of one micro-batch.

        Args:
            num: positions at which there is a teacher.
            labeled: which kind the batch is; all its samples are of one kind.
            num_labels: positions with a label to learn; of an unlabelled batch there is none, of a
                labelled one every counted position has one unless this says otherwise.
            conf_weights: [num] raw, the very ones that the objective will apply; None where
                `conf_power` is 0.
        """
        # Summed in float64 on the CPU, since not every device has it.
        weight_sum = 0.0 if conf_weights is None else conf_weights.cpu().double().sum().item()
        if not labeled:
            return cls(num_unlabeled=num, conf_weight_sum_unlabeled=weight_sum)
        return cls(
            num_labeled=num,
            conf_weight_sum_labeled=weight_sum,
            num_labels=num if num_labels is None else num_labels,
        )

    def num(self, *, labeled: bool) -> int:
        """How many there are of one kind."""
        return self.num_labeled if labeled else self.num_unlabeled

    def num_chunks(self, *, labeled: bool) -> int:
        """How many chunks of text of one kind."""
        return self.num_chunks_labeled if labeled else self.num_chunks_unlabeled

    def check_covers(self, num: int, *, labeled: bool) -> None:
        """Refuse a batch that the step does not count.

        Raises:
            ValueError: if the step counts fewer of that kind than `num`.
        """
        if self.num(labeled=labeled) < num:
            raise ValueError(f"a batch of {num} in a step that counts {self.num(labeled=labeled)}")

    def mean(
        self, values: Tensor, weights: Tensor | None, *, labeled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A batch's share of the step's mean of a distillation term over one kind.

        Args:
            values: [B], one of each of the batch's.
            weights: [B] raw confidence weights, or None where `conf_power` is 0. Normalised by
                their mean over the step's samples *of the same kind*.
            labeled: the batch's kind.

        Returns:
            Its share of the mean, and of the mean raw weight where there are weights.

        Raises:
            UserError: if `conf_power` is so high that nothing keeps any weight.
        """
        # A step of nothing of that kind has a sum of 0.
        num = max(1, self.num(labeled=labeled))
        if weights is None:
            return values.sum() / num, None
        weight_sum = self.conf_weight_sum_labeled if labeled else self.conf_weight_sum_unlabeled
        if not len(values):
            weight_sum = 1.0
        if not weight_sum > 0:
            raise UserError(
                "The confidence weights leave nothing in a step any weight: the teacher's top "
                "probabilities to the power of --conf-power underflow; choose a lower --conf-power"
            )
        # sum_i (w_i / mean w) kl_i / num: the counts cancel.
        return (weights * values).sum() / weight_sum, weights.sum() / num
