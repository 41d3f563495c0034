"""The distillation objective of a language model: positions where a classifier has samples.

In a labelled corpus every real next token is a label: `alpha T^2 KD + (1 - alpha) CE`. A second
corpus, trained without cross-entropy, costs `unlabeled_alpha T^2 KD`. Each term is a mean over its
own counted positions of the whole optimizer step, however the step is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import chosen_measure, divergence
from teacher_cache.stages.losses.draws import (
    MappedDraws,
    SampledTargets,
    mapped_draws_kl,
    sampled_kl,
)
from teacher_cache.stages.losses.objective import (
    DistillationTerms,
    smoothed_cross_entropy,
    weighted_sum,
)
from teacher_cache.stages.losses.step_totals import StepTotals, weights_of_top1

Targets = TeacherDistribution | SampledTargets | MappedDraws


@dataclass(frozen=True, kw_only=True)
class LanguageModelTerms(DistillationTerms):
    """Those of a language model.

    On a labelled batch, `loss = alpha T^2 kd + (1 - alpha) ce`.

    Attributes:
        agreement: share of the teacher's positions at which student and teacher hold the same
            token for the most probable; None for drawn targets, which may have missed it.
        effective_draws: mean effective sample size of drawn targets, of N; below
            `MIN_EFFECTIVE_DRAWS` their estimates are mostly noise. None for others.
    """

    agreement: Tensor | None
    effective_draws: Tensor | None


def language_model_objective(
    student_logits: Tensor,
    targets: Targets,
    next_ids: Tensor | None,
    *,
    config: ObjectiveConfig,
    totals: StepTotals,
    top1_log_prob: Tensor | None = None,
    has_teacher: Tensor | None = None,
    support: Tensor | None = None,
) -> LanguageModelTerms:
    """One micro-batch's share of the optimizer step's loss.

    Give the counted positions only, no padding and no prompts: a head that runs on them alone is
    the cheapest mask. What `distillation_objective` says of weights of 0, of the two kinds and of
    data parallelism holds here too.

    Args:
        student_logits: [N, V], before temperature; carry the gradient.
        targets: the teacher's, at N positions and at `config.temperature`.
        next_ids: [N] int64, the next real tokens, `objective.NO_LABEL` where there is none to
            learn; None for an unlabelled batch.
        config: the weights of the terms; `lm_weight` and `pooled_weight` are a classifier's.
        totals: of the whole optimizer step that this micro-batch belongs to.
        top1_log_prob: [N] as cached, at T = 1; given where `conf_power` is above 0.
        has_teacher: [N] bool, False where a position has a next token but no teacher; what
            `targets` holds there is not read. None: all have one.
        support: [V] bool, over which teacher and student are compared. The cross-entropy is over
            all V: it teaches rows that pad a table that they never come.

    Raises:
        ValueError: if shapes or temperatures disagree, if `totals` does not cover this batch, if
            `top1_log_prob` is missing, or for an unlabelled batch when `unlabeled_alpha` is 0.
        UserError: if `conf_power` is so high that no position keeps any weight.
    """
    labeled = next_ids is not None
    _check(student_logits, targets, next_ids, config, top1_log_prob, has_teacher)
    if has_teacher is not None:
        targets = targets.at_positions(has_teacher)
        top1_log_prob = None if top1_log_prob is None else top1_log_prob[has_teacher]
    taught = student_logits if has_teacher is None else student_logits[has_teacher]
    totals.check_covers(len(taught), labeled=labeled)

    weights = None
    if config.conf_power and top1_log_prob is not None:
        weights = weights_of_top1(top1_log_prob, config.conf_power)
    values = _divergences(taught, targets, config, support)  # [N with a teacher]
    kd, conf_w = totals.mean(values, weights, labeled=labeled)
    kd_weight = config.alpha if labeled else config.unlabeled_alpha
    weighted = [(kd_weight * config.temperature**2, kd)]
    ce = None
    if next_ids is not None:
        smoothing = config.label_smoothing
        per_position = smoothed_cross_entropy(student_logits, next_ids, label_smoothing=smoothing)
        ce = per_position.sum() / max(1, totals.num_next_tokens)
        weighted.append((1 - config.alpha, ce))

    num = max(1, totals.num(labeled=labeled))
    agreement, effective_draws = None, None
    if isinstance(targets, SampledTargets):
        effective_draws = targets.effective_draws().sum() / num
    elif isinstance(targets, MappedDraws):
        effective_draws = targets.effective_draws.sum() / num
    else:
        agreement = (taught.argmax(dim=-1) == targets.top_ids()).sum() / num
    return LanguageModelTerms(
        loss=weighted_sum(weighted),
        ce=None if ce is None else ce.detach(),
        kd=kd.detach(),
        conf_w=conf_w,
        agreement=agreement,
        effective_draws=effective_draws,
    )


def _divergences(
    student_logits: Tensor, targets: Targets, config: ObjectiveConfig, support: Tensor | None
) -> Tensor:
    """[N]: drawn targets estimate the forward KL without bias, all else needs a distribution."""
    if isinstance(targets, SampledTargets):
        if config.divergence == "kl":
            return sampled_kl(student_logits, targets, support=support)
        targets = targets.coarse()
    elif isinstance(targets, MappedDraws):
        if config.divergence == "kl":
            return mapped_draws_kl(student_logits, targets, support=support)
        targets = targets.head
    return divergence(student_logits, targets, chosen_measure(config), support=support)


def _check(
    student_logits: Tensor,
    targets: Targets,
    next_ids: Tensor | None,
    config: ObjectiveConfig,
    top1_log_prob: Tensor | None,
    has_teacher: Tensor | None,
) -> None:
    num = student_logits.shape[:1]
    for name, one in (
        ("next_ids", next_ids),
        ("top1_log_prob", top1_log_prob),
        ("has_teacher", has_teacher),
    ):
        if one is not None and one.shape != num:
            raise ValueError(
                f"{name} of shape {tuple(one.shape)} for student logits of shape "
                f"{tuple(student_logits.shape)}: expected [N] and [N, V]"
            )
    if targets.temperature != config.temperature:
        raise ValueError(
            f"the targets are at temperature {targets.temperature}, the objective at "
            f"{config.temperature}"
        )
    if next_ids is None and not config.unlabeled_alpha:
        raise ValueError("an unlabelled batch has no loss when unlabeled_alpha is 0")
    if config.conf_power and top1_log_prob is None:
        raise ValueError("conf_power is on, so the teacher's top1_log_prob is needed")
