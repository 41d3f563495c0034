"""Draws from a teacher, seen by a student of other ids.

A draw, mapped, is a draw from the mapped teacher, so what is linear in its probabilities is
estimated without bias here too (`sampled`). A draw of an id that maps to none of the student's is
one of the outcome that the student has no name for: the ghost token of maths.md 2, which stands for
all the student's ids that no id of the teacher's maps to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher_cache.stages.losses.student_outcomes import head_log_probs
from teacher_cache.stages.losses.teacher_distribution import TeacherDistribution, widened


@dataclass(frozen=True, kw_only=True)
class MappedDraws:
    """The student's ids that were drawn at each position, and how much each counts.

    Attributes:
        ids: [..., D] int64, distinct along D; -1 for an empty slot.
        weights: [..., D] what stands for the teacher's probabilities, as `SampledTargets.weights`;
            0 in an empty slot.
        ghost_weight: [...] the same of all draws without an id.
        information: [...] nats, `sum w log p` of the draws that have an id. No gradient depends on
            it; exact where one of the teacher's ids maps to each.
        ghost_information: [...] the same of those without.
        reached: [V] bool, the student's ids that any of the teacher's maps to.
        effective_draws: [...] effective sample size.
        head: the drawn ids with their exact probabilities and a ghost, for other divergences than
            the forward KL.
    """

    ids: Tensor
    weights: Tensor
    ghost_weight: Tensor
    information: Tensor
    ghost_information: Tensor
    reached: Tensor
    effective_draws: Tensor
    head: TeacherDistribution

    @property
    def temperature(self) -> float:
        """At which teacher and student are compared."""
        return self.head.temperature

    def at_positions(self, where: Any) -> MappedDraws:
        """The same at a part of the positions; `where` indexes the dimensions before D."""
        return MappedDraws(
            ids=self.ids[where],
            weights=self.weights[where],
            ghost_weight=self.ghost_weight[where],
            information=self.information[where],
            ghost_information=self.ghost_information[where],
            reached=self.reached,
            effective_draws=self.effective_draws[where],
            head=self.head.at_positions(where),
        )


def mapped_draws_kl(
    student_logits: Tensor, targets: MappedDraws, *, support: Tensor | None = None
) -> Tensor:
    """Estimate of the forward KL over the student's ids and the ghost, from draws.

    The gradient is unbiased; the value is where `information` is exact. Not scaled: the objective
    applies T**2 once. Where every id of the student's is reached the ghost is no outcome of its,
    and its draws count for nothing, as missing ids do.

    Args:
        student_logits: [..., V], before temperature.
        targets: of the same positions.
        support: [V] bool, False for ids that are no outcome at all.

    Returns:
        [...] nats, float32 or wider.

    Raises:
        ValueError: if the positions or the outcomes disagree.
    """
    shape, num = student_logits.shape[:-1], student_logits.shape[-1]
    if shape != targets.ids.shape[:-1] or targets.reached.shape != (num,):
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} against drawn ids of shape "
            f"{tuple(targets.ids.shape)} of {tuple(targets.reached.shape)} outcomes"
        )
    log_q = head_log_probs(student_logits, targets.ids, targets.temperature, support)[..., :-1]
    drawn = targets.weights != 0  # as in `kl`: 0 * inf is NaN
    cross = torch.where(drawn, targets.weights * torch.where(drawn, log_q, 0.0), 0.0).sum(dim=-1)
    value = targets.information - cross
    has_ghost = targets.ghost_weight != 0
    if not has_ghost.any():
        return value
    outcomes = torch.ones_like(targets.reached) if support is None else support
    unreached = outcomes & ~targets.reached
    if not unreached.any():
        return value
    scaled = widened(student_logits[has_ghost]) / targets.temperature
    of_all = scaled.masked_fill(~outcomes, -torch.inf).logsumexp(dim=-1)
    log_ghost = scaled[:, unreached].logsumexp(dim=-1) - of_all
    ghost = targets.ghost_information[has_ghost] - targets.ghost_weight[has_ghost] * log_ghost
    return value.index_put((has_ghost,), ghost, accumulate=True)
