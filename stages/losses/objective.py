"""The distillation objective: what one micro-batch adds to the loss of its optimizer step.

Labelled samples cost `alpha T^2 KD + (1 - alpha) CE`, unlabelled ones `unlabeled_alpha T^2 KD`,
and both kinds `lm_weight` times the cross-entropy of their next tokens and `pooled_weight` times
the cosine distance of their pooled states. Each term is a mean over its own samples (or positions)
of the whole optimizer step, all micro-batches and ranks, so a micro-batch adds `sum over its
samples / count of the step`, and the sum over micro-batches is the step's loss however the step was
cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution, widened
from teacher_cache.stages.losses.divergences import chosen_measure, divergence
from teacher_cache.stages.losses.step_totals import StepTotals, confidence_weights

NO_LABEL = -100
"""Stands for the label where there is none, as in torch and transformers."""


@dataclass(frozen=True, kw_only=True)
class DistillationTerms:
    """One micro-batch's share of its optimizer step; sum each over the micro-batches for the step.

    All are scalars over the counts of the step, not of the micro-batch. Only `loss` carries a
    gradient; the others are for the log, and `ce` and `kd` are given even where their weight is 0.

    Attributes:
        loss: what to call backward on.
        ce: cross-entropy to the labels, nats; None on an unlabelled batch.
        kd: distillation term, nats, confidence-weighted when that is on, before alpha and T^2.
        conf_w: mean raw confidence weight; None when weighting is off.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor
    conf_w: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ObjectiveTerms(DistillationTerms):
    """Those of a classifier.

    On a labelled batch, `loss = alpha T^2 kd + (1 - alpha) ce + lm_weight lm +
    pooled_weight pooled`.

    Attributes:
        agreement: share of samples on which student and teacher choose the same class.
        lm: cross-entropy of the next tokens, nats; None when `lm_weight` is 0.
        pooled: cosine distance of the pooled states, 0 to 2; None when `pooled_weight` is 0.
    """

    agreement: Tensor
    lm: Tensor | None
    pooled: Tensor | None


def smoothed_cross_entropy(
    student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """Cross-entropy to hard labels of which a part is spread evenly over all classes.

    At T = 1, float32 or wider (Szegedy et al. 2016, section 7, arXiv:1512.00567).

    Args:
        student_logits: [B, C], before temperature.
        labels: [B] int64 in 0..C-1; a sample of label `NO_LABEL` costs 0.
        label_smoothing: the part that is spread, in [0, 1).

    Returns:
        [B] nats.
    """
    return F.cross_entropy(
        widened(student_logits),
        labels,
        label_smoothing=label_smoothing,
        ignore_index=NO_LABEL,
        reduction="none",
    )


def weighted_sum(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Of the terms whose weight is not 0; the others are left out, not multiplied by 0."""
    parts = [weight * term for weight, term in weighted if weight]
    return sum(parts[1:], start=parts[0])


def distillation_objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    config: ObjectiveConfig,
    totals: StepTotals,
    next_token_loss_sum: Tensor | None = None,
    pooled_distance_sum: Tensor | None = None,
) -> ObjectiveTerms:
    """One micro-batch's share of the optimizer step's loss.

    A term whose weight is 0 is left out, not multiplied by 0: an infinite or NaN term with weight
    0 changes neither the loss nor a gradient.

    Where the maths leave a choice: confidence weights are normalised by their mean over the
    step's samples *of the same kind*, so that turning the weighting on moves attention within the
    labelled and within the unlabelled samples, but not between the two. They are taken at T = 1
    and stand outside T^2. Under data parallelism, which averages gradients over ranks, the caller
    multiplies `loss` by the number of ranks, since `totals` counts the samples of all of them.

    Args:
        student_logits: [B, C], before temperature; carry the gradient.
        teacher_logits: [B, C], before temperature, as cached.
        labels: [B] int64, or None for an unlabelled batch.
        config: the weights of the terms.
        totals: of the whole optimizer step that this micro-batch belongs to.
        next_token_loss_sum: scalar, the batch's next-token cross-entropies summed, nats; given
            where `lm_weight` is above 0, and only there.
        pooled_distance_sum: scalar, the batch's `pooled_distance` summed; given where
            `pooled_weight` is above 0, and only there. No confidence weights, no T^2.

    Raises:
        ValueError: if shapes disagree, if `totals` does not cover this batch, if the next-token
            loss or the pooled distance is missing or has no weight, or for an unlabelled batch
            when `unlabeled_alpha` is 0, since nothing is to be learned from it.
        UserError: if `conf_power` is so high that no sample keeps any weight.
    """
    labeled = labels is not None
    num = totals.num(labeled=labeled)
    totals.check_covers(len(student_logits), labeled=labeled)
    if not labeled and not config.unlabeled_alpha:
        raise ValueError("an unlabelled batch has no loss when unlabeled_alpha is 0")
    if (next_token_loss_sum is not None) != bool(config.lm_weight):
        raise ValueError(
            f"lm_weight is {config.lm_weight}: a next-token loss goes with one above 0"
        )
    if (pooled_distance_sum is not None) != bool(config.pooled_weight):
        raise ValueError(
            f"pooled_weight is {config.pooled_weight}: a pooled distance goes with one above 0"
        )

    teacher = TeacherDistribution.from_logits(teacher_logits, config.temperature)
    values = divergence(student_logits, teacher, chosen_measure(config))  # [B]
    weights = confidence_weights(teacher_logits, config.conf_power) if config.conf_power else None
    kd, conf_w = totals.mean(values, weights, labeled=labeled)
    ce = None
    if labels is not None:
        smoothing = config.label_smoothing
        per_sample = smoothed_cross_entropy(student_logits, labels, label_smoothing=smoothing)
        ce = per_sample.sum() / num

    lm = None
    if next_token_loss_sum is not None:
        # A step of samples of one token has none, and a sum of 0.
        lm = next_token_loss_sum / max(1, totals.num_next_tokens)

    pooled = None
    if pooled_distance_sum is not None:
        pooled = pooled_distance_sum / (totals.num_labeled + totals.num_unlabeled)

    kd_weight = config.alpha if labeled else config.unlabeled_alpha
    weighted = [(kd_weight * config.temperature**2, kd)]
    if ce is not None:
        weighted.append((1 - config.alpha, ce))
    if lm is not None:
        weighted.append((config.lm_weight, lm))
    if pooled is not None:
        weighted.append((config.pooled_weight, pooled))
    agree = student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
    return ObjectiveTerms(
        loss=weighted_sum(weighted),
        ce=None if ce is None else ce.detach(),
        kd=kd.detach(),
        conf_w=conf_w,
        agreement=agree.sum() / num,
        lm=None if lm is None else lm.detach(),
        pooled=None if pooled is None else pooled.detach(),
    )
