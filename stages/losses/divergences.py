"""Divergences from a cached teacher to the student, one sample at a time, in log space."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_cache.stages.losses.teacher_distribution import TeacherDistribution, widened


def forward_kl(student_logits: Tensor, teacher: TeacherDistribution) -> Tensor:
    """Forward KL, `sum_c p_c (log p_c - log q_c)`, from the teacher to the student.

    float32 or wider; not scaled: the objective applies T**2 once (Hinton et al. 2015,
    section 2, arXiv:1503.02531).

    Args:
        student_logits: [B, C], before temperature.
        teacher: log-probs [B, C], at the temperature at which the two are compared. An outcome
            with log-prob -inf contributes 0, to the value and to the gradient.

    Returns:
        [B] nats; the objective sums them and divides by the count of the whole optimizer step.

    Raises:
        ValueError: if the shapes disagree.
    """
    if student_logits.shape != teacher.log_probs.shape:
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} against teacher log-probs of "
            f"shape {tuple(teacher.log_probs.shape)}: they must agree"
        )
    student_log_probs = torch.log_softmax(widened(student_logits) / teacher.temperature, dim=-1)
    # Double `where`: 0 * (-inf - x) is NaN, and a NaN that is masked only afterwards still reaches
    # the gradient, so the infinite terms are taken out before the product and again after it.
    # `!=`, not `>`: a teacher's NaN must come out as NaN, not pass for an excluded outcome.
    possible = teacher.log_probs != -torch.inf
    log_p = torch.where(possible, teacher.log_probs, 0.0)
    log_q = torch.where(possible, student_log_probs, 0.0)
    terms = torch.where(possible, log_p.exp() * (log_p - log_q), 0.0)  # [B, C]
    return terms.sum(dim=-1)
