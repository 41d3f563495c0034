"""From a cache's stored positions to what the losses compare the student with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.stages.codecs.interface import Answer, Drawn, Weighted
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.draws import (
    Draws,
    MappedDraws,
    SampledTargets,
    WeightedTargets,
)
from teacher_cache.stages.losses.linear_head import MAX_LOGITS
from teacher_cache.stages.losses.objective import TargetsByPosition
from teacher_cache.stages.tokens.mapped_teacher import map_head
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection, learned_share_at


@dataclass(frozen=True, kw_only=True)
class CachedTargets:
    """Positions as stored, decoded a run at a time: a whole support of all would fill the memory.

    Attributes:
        codec: of the cache, opened, on the device of `stored`.
        stored: [N, ...] each, the codec's fields by name, expanded.
        temperature: at which teacher and student are compared.
        num_outcomes: of the student, at least the support's.
    """

    codec: Codec
    stored: Mapping[str, Tensor]
    temperature: float
    num_outcomes: int

    def answers_at(self, where: slice) -> Answer:
        """What the cache says at a run of positions.

        Raises:
            UserError: if it does not serve the temperature.
        """
        stored = {name: field[where] for name, field in self.stored.items()}
        return room_of(self.codec).answer(self.codec, stored, self.temperature)

    def at_positions(self, where: slice) -> Compared:
        """The teacher at a run of positions.

        Raises:
            UserError: if the cache does not serve the temperature.
        """
        return compared(self.answers_at(where), num_outcomes=self.num_outcomes)


Compared = TeacherDistribution | SampledTargets | WeightedTargets


def compared(found: Answer, *, num_outcomes: int) -> Compared:
    """A cache's answer as the losses take it.

    Args:
        found: over the cached ids.
        num_outcomes: of the student; the teacher rules out those that it has no id of.
    """
    if isinstance(found, Drawn):
        return _sampled(found)
    if isinstance(found, Weighted):
        return _weighted(found)
    if found.ids is None:
        missing = num_outcomes - found.log_probs.shape[-1]
        return TeacherDistribution(
            log_probs=torch.nn.functional.pad(found.log_probs, (0, missing), value=-torch.inf),
            temperature=found.temperature,
        )
    return TeacherDistribution(
        log_probs=found.log_probs,
        head_ids=found.ids,
        tail_log_prob=found.tail_log_prob,
        temperature=found.temperature,
    )


def _sampled(found: Drawn) -> SampledTargets:
    """Draws with the teacher's log-probs at a temperature, drawn from it at another."""
    drawn = SampledTargets(
        ids=found.ids,
        counts=found.counts,
        log_probs=found.log_probs,
        proposal_log_probs=found.log_probs,
        temperature=found.draw_temperature,
        support_size=found.support_size,
    )
    if found.lse is None or found.new_lse is None:
        return drawn
    return drawn.at_temperature(found.temperature, lse=found.lse, new_lse=found.new_lse)


def _weighted(found: Weighted) -> WeightedTargets:
    return WeightedTargets(
        ids=found.ids,
        log_probs=found.log_probs,
        shares=found.weights,
        num_heads=found.num_heads,
        head=TeacherDistribution(
            log_probs=found.head_log_probs,
            head_ids=found.ids,
            tail_log_prob=found.tail_log_prob,
            temperature=found.temperature,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class FixedMap:
    """Where the cached ids go.

    Attributes:
        student_ids: int64 [V_t], the student's id of each cached one, -1 for none.
        reached: [V] bool, the student's ids that any of the teacher's maps to.
    """

    student_ids: Tensor
    reached: Tensor

    def to(self, device: torch.device) -> FixedMap:
        """On a device."""
        return FixedMap(student_ids=self.student_ids.to(device), reached=self.reached.to(device))


@dataclass(frozen=True, kw_only=True)
class MappedTargets:
    """By a fixed map: what maps to no id of the student's joins the ghost, and so does the tail.

    Attributes:
        cached: of the teacher's ids, or of the student's where they were mapped at capture.
        fixed: where those go.
    """

    cached: CachedTargets
    fixed: FixedMap

    def at_positions(self, where: slice) -> TeacherDistribution | MappedDraws:
        """The teacher at a run of positions, always with a ghost."""
        answer = self.cached.answers_at(where)
        found = compared(answer, num_outcomes=self.cached.num_outcomes)
        head = head_of(found, num_ids=len(self.fixed.student_ids))
        assert head.head_ids is not None and head.tail_log_prob is not None, "it is a head"
        ids, log_probs, tail = map_head(
            head.head_ids, head.log_probs, head.tail_log_prob, self.fixed.student_ids
        )
        mapped = TeacherDistribution(
            log_probs=log_probs,
            head_ids=ids,
            tail_log_prob=tail,
            temperature=head.temperature,
        )
        if isinstance(answer, Drawn):
            return mapped_draws(_sampled(answer), self.fixed, mapped, _without_id(answer))
        if isinstance(answer, Weighted):
            return mapped_draws(_weighted(answer), self.fixed, mapped, _known_without_id(answer))
        return mapped


@dataclass(frozen=True, kw_only=True)
class WithoutId:
    """What of a teacher had no id when it was cached, at some positions.

    Attributes:
        share_with_id: [...], by which the weights of all others are multiplied.
        log_weight: [...] nats, of what stands for it.
        log_prob: [...] nats, of its own probability; None where that is what stands for it.
    """

    share_with_id: Tensor | float
    log_weight: Tensor
    log_prob: Tensor | None


def _without_id(found: Drawn) -> WithoutId:
    """By how many draws met it, where there are any."""
    unmatched = found.unmatched
    if unmatched is None:
        nothing = torch.full_like(found.log_probs[..., 0], -torch.inf)
        return WithoutId(share_with_id=1.0, log_weight=nothing, log_prob=None)
    num_with_id = found.counts.sum(dim=-1)
    num_without = unmatched.num_draws - num_with_id
    share = (num_without / unmatched.num_draws).to(found.log_probs.dtype)
    return WithoutId(
        share_with_id=(num_with_id / unmatched.num_draws).unsqueeze(-1),
        log_weight=share.log() + unmatched.log_prob - unmatched.drawn_log_prob,
        log_prob=unmatched.log_prob,
    )


def _known_without_id(found: Weighted) -> WithoutId:
    """By its mass, which no draw had to meet."""
    return WithoutId(share_with_id=1.0, log_weight=found.unmatched_log_prob, log_prob=None)


def mapped_draws(
    found: SampledTargets | WeightedTargets,
    fixed: FixedMap,
    head: TeacherDistribution,
    without_id: WithoutId,
) -> MappedDraws:
    """Draws as the student's ids; those without one count for the ghost.

    Args:
        found: [..., D] of the cached ids.
        fixed: where those go.
        head: of the distinct drawn ids, mapped.
        without_id: what had no id when it was cached.
    """
    student_ids = fixed.student_ids
    weights = found.weights() * without_id.share_with_id
    ids, log_weights, log_ghost = map_head(
        found.ids, weights.log(), without_id.log_weight, student_ids
    )
    has_id = torch.cat([student_ids, student_ids.new_full((1,), -1)])[found.ids] >= 0
    counts = has_id & (weights != 0)
    ghost_weight = log_ghost.exp()
    # The ghost's own probability is known where it was stored, else as its draws say.
    of_ghost = log_ghost if without_id.log_prob is None else without_id.log_prob
    information = weights * torch.where(counts, found.log_probs, 0.0)
    return MappedDraws(
        ids=ids,
        weights=log_weights.exp(),
        ghost_weight=ghost_weight,
        information=torch.where(counts, information, 0.0).sum(dim=-1),
        ghost_information=ghost_weight * torch.where(ghost_weight != 0, of_ghost, 0.0),
        reached=fixed.reached,
        effective_draws=found.num_effective(),
        head=head,
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
        found = self.cached.at_positions(where)
        head = head_of(found, num_ids=len(self.projection.student_ids))
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


def head_of(found: Compared, *, num_ids: int) -> TeacherDistribution:
    """Positions as a head and its ghost, whatever the codec.

    Args:
        found: over the cached ids.
        num_ids: of the teacher's support; a whole distribution is a head of so many.
    """
    if isinstance(found, Draws):
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


@dataclass(frozen=True, kw_only=True)
class CachedTeacher:
    """The distributions as cached; a `TargetsOf`.

    Attributes:
        codec: of the cache; one of hidden states with its head, on the training's device.
        fixed: from the cached ids to the student's; None where they are the same.
    """

    codec: Codec
    fixed: FixedMap | None = None

    def __call__(
        self,
        stored: Mapping[str, Tensor],
        *,
        temperature: float,
        num_outcomes: int,
        step: int | None,
    ) -> TargetsByPosition:
        """Through the fixed map, at every step alike."""
        fixed = self.fixed
        cached = CachedTargets(
            codec=self.codec,
            stored=stored,
            temperature=temperature,
            num_outcomes=num_outcomes if fixed is None else len(fixed.student_ids),
        )
        return cached if fixed is None else MappedTargets(cached=cached, fixed=fixed)

    @property
    def learned(self) -> Sequence[Tensor]:
        """None."""
        return ()

    @property
    def max_logits(self) -> int:
        """As many as ever."""
        return MAX_LOGITS


@dataclass(frozen=True, kw_only=True)
class ProjectedTeacher:
    """The distributions through a projection that learns beside the student; a `TargetsOf`.

    Attributes:
        fixed: through the fixed map, with which held-out distances are measured, so that they can
            be compared with those of `map`.
        projection: of the teacher's ids.
        between: the steps between which the fixed map passes into the learned projection.
    """

    fixed: CachedTeacher
    projection: LearnedProjection
    between: tuple[int, int]

    def __call__(
        self,
        stored: Mapping[str, Tensor],
        *,
        temperature: float,
        num_outcomes: int,
        step: int | None,
    ) -> TargetsByPosition:
        """Through the projection as it is at a step, or through the fixed map."""
        if step is None:
            return self.fixed(stored, temperature=temperature, num_outcomes=num_outcomes, step=None)
        start, end = self.between
        codec = self.fixed.codec
        return ProjectedTargets(
            cached=CachedTargets(
                codec=codec,
                stored=stored,
                temperature=temperature,
                num_outcomes=codec.support_size,
            ),
            projection=self.projection,
            learned_share=learned_share_at(step, start=start, end=end),
        )

    @property
    def learned(self) -> Sequence[Tensor]:
        """The projection's scores."""
        return (self.projection.scores,)

    @property
    def max_logits(self) -> int:
        """Fewer where a whole distribution, projected, takes several times the student's place."""
        if room_of(self.fixed.codec).projects_in_place:
            return MAX_LOGITS
        return MAX_LOGITS // (self.projection.student_ids.shape[1] + 3)
