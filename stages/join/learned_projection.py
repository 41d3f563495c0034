"""A projection of the teacher's distribution to the student's ids that is trained with the student.

Sparse and row-stochastic: each teacher id spreads its mass over at most M student ids, by a softmax
over learned scores. It begins as the fixed map; a schedule moves from the map to what was learned.
The teacher's mass is kept at every step: what a row cannot place goes to the ghost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from teacher_cache.stages.join.projection_candidates import Candidates
from teacher_cache.stages.losses.distributions import widened
from teacher_cache.stages.tokens.mapped_teacher import merged_head

_LOWEST_WEIGHT = 1e-4  # below it a candidate's score would be out of training's reach


class LearnedProjection(nn.Module):
    """Teacher ids to student ids by weights, in log space."""

    def __init__(self, fixed: Candidates, learned: Candidates | None = None):
        """Begin as the fixed map.

        Args:
            fixed: the map from which the schedule starts; its weights stay.
            learned: where the learned rows begin, `fixed` by default.
        """
        super().__init__()
        start = fixed if learned is None else learned
        used = start.student_ids >= 0
        scores = torch.where(used, start.weights.clamp_min(_LOWEST_WEIGHT).log(), 0.0)
        self.scores = nn.Parameter(scores)
        self.student_ids: Tensor
        self.fixed_ids: Tensor
        self.fixed_weights: Tensor
        self.register_buffer("student_ids", start.student_ids)
        self.register_buffer("fixed_ids", fixed.student_ids)
        self.register_buffer("fixed_weights", fixed.weights)

    def learned_log_weights(self) -> Tensor:
        """[V_t, M] log of the learned weights; a row sums to 1, or is -inf throughout."""
        used = self.student_ids >= 0
        # A row without candidates would be NaN: it gets one score, which is masked again.
        some = used.any(dim=-1, keepdim=True)
        scores = torch.where(used | ~some, self.scores, -torch.inf)
        return torch.where(used, scores.log_softmax(dim=-1), -torch.inf)

    def forward(
        self,
        head_ids: Tensor,
        log_probs: Tensor,
        tail_log_prob: Tensor,
        *,
        learned_share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project a head to the student's ids.

        Args:
            head_ids: [..., K] int64 teacher ids, -1 in an empty slot.
            log_probs: [..., K] nats, -inf in an empty slot.
            tail_log_prob: [...] nats, of the mass outside the head.
            learned_share: 0 for the fixed map, 1 for the learned one (`learned_share_at`).

        Returns:
            student ids [..., N], distinct but for -1; log-probs [..., N], -inf in an empty slot;
            the ghost's log-prob [...]. Together they have the mass of head and tail.

        Raises:
            ValueError: if `learned_share` is not in 0..1 or a head id is none of the teacher's.
        """
        if not 0 <= learned_share <= 1:
            raise ValueError(f"learned_share is {learned_share}, expected 0 to 1")
        num_teacher = self.student_ids.shape[0]
        if head_ids.numel() and not (head_ids.min() >= -1 and head_ids.max() < num_teacher):
            raise ValueError(f"head ids outside -1..{num_teacher - 1}")
        parts = [
            _spread(head_ids, widened(log_probs) + math.log(share), ids, log_weights)
            for ids, log_weights, share in (
                (self.fixed_ids, _log_or_inf(self.fixed_weights), 1 - learned_share),
                (self.student_ids, self.learned_log_weights(), learned_share),
            )
            if share > 0
        ]
        places = torch.cat([place for place, _ in parts], dim=-1)
        masses = torch.cat([mass for _, mass in parts], dim=-1)
        return merged_head(places, masses, tail_log_prob)


def learned_share_at(step: int, *, start: int, end: int) -> float:
    """The schedule: the fixed map until `start`, the learned one from `end`, linear between.

    Raises:
        ValueError: if `end` comes before `start`.
    """
    if end < start:
        raise ValueError(f"the schedule ends at step {end}, before its start at {start}")
    if step >= end:
        return 1.0
    return max(step - start, 0) / (end - start)


def _spread(
    head_ids: Tensor, log_probs: Tensor, ids: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Student ids and masses [..., K*(M+1)] of what a head becomes; -1 is the ghost's."""
    empty = head_ids < 0
    rows = torch.where(empty, 0, head_ids)  # an empty slot has no mass, whatever row it reads
    unplaced = torch.where((ids >= 0).any(dim=-1), -torch.inf, log_weights.new_zeros(()))
    places = torch.cat([ids, torch.full_like(ids[:, :1], -1)], dim=-1)[rows]
    weights = torch.cat([log_weights, unplaced[:, None]], dim=-1)[rows]
    masses = torch.where(empty[..., None], -torch.inf, log_probs[..., None] + weights)
    return places.flatten(-2), masses.flatten(-2)


def _log_or_inf(weights: Tensor) -> Tensor:
    return torch.where(weights > 0, weights, 1.0).log().where(weights > 0, -torch.inf)
