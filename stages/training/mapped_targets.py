"""A cached teacher's distributions over the student's ids, decoded a run of positions at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.stages.join.learned_projection import LearnedProjection
from teacher_cache.stages.join.mapped_teacher import map_head
from teacher_cache.stages.losses.sampled import SampledTargets
from teacher_cache.stages.losses.teacher_distribution import TeacherDistribution
from teacher_cache.stages.training.cached_targets import CachedTargets


@dataclass(frozen=True, kw_only=True)
class MappedTargets:
    """By a fixed map: what maps to no id of the student's joins the ghost, and so does the tail.

    Attributes:
        cached: of the teacher's ids; draws count as a head with its exact probabilities, since
            merged ids' draws would no longer be draws.
        student_ids: [V_t] int64, -1 for none.
    """

    cached: CachedTargets
    student_ids: Tensor

    def at_positions(self, where: slice) -> TeacherDistribution:
        """The teacher at a run of positions, always with a ghost."""
        head = head_of(self.cached, where, num_ids=len(self.student_ids))
        assert head.head_ids is not None and head.tail_log_prob is not None, "it is a head"
        ids, log_probs, tail = map_head(
            head.head_ids, head.log_probs, head.tail_log_prob, self.student_ids
        )
        return TeacherDistribution(
            log_probs=log_probs,
            head_ids=ids,
            tail_log_prob=tail,
            temperature=head.temperature,
        )


@dataclass(frozen=True, kw_only=True)
class ProjectedTargets:
    """By a projection that learns: its weights get a gradient.

    Attributes:
        cached: of the teacher's ids.
        projection: from them to the student's.
        learned_share: of the learned weights, 0 to 1; the fixed map has the rest.
    """

    cached: CachedTargets
    projection: LearnedProjection
    learned_share: float

    def at_positions(self, where: slice) -> TeacherDistribution:
        """The teacher at a run of positions, always with a ghost."""
        head = head_of(self.cached, where, num_ids=len(self.projection.student_ids))
        assert head.head_ids is not None and head.tail_log_prob is not None, "it is a head"
        ids, log_probs, tail = self.projection(
            head.head_ids, head.log_probs, head.tail_log_prob, learned_share=self.learned_share
        )
        return TeacherDistribution(
            log_probs=log_probs,
            head_ids=ids,
            tail_log_prob=tail,
            temperature=head.temperature,
        )


def head_of(cached: CachedTargets, where: slice, *, num_ids: int) -> TeacherDistribution:
    """A run of positions as a head and its ghost, whatever the codec.

    Args:
        cached: of the teacher's ids.
        where: the positions.
        num_ids: of the teacher's support; a whole distribution is a head of so many.
    """
    found = cached.at_positions(where)
    if isinstance(found, SampledTargets):
        return found.coarse()
    if found.head_ids is not None:
        return found
    log_probs = found.log_probs[..., :num_ids]
    ids = torch.arange(num_ids, device=log_probs.device).expand(log_probs.shape)
    possible = log_probs != -torch.inf
    return TeacherDistribution(
        log_probs=log_probs,
        head_ids=torch.where(possible, ids, -1),
        tail_log_prob=torch.full_like(log_probs[..., 0], -torch.inf),
        temperature=found.temperature,
    )
