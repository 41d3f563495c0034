"""From a cache's stored positions to what the losses compare the student with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.cache.codecs.ids import unpack_ids
from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.codecs.ragged_heads import is_filled, masked_ids
from teacher_cache.cache.codecs.sampled import (
    COUNTS,
    IDS,
    LOG_PROBS,
    LSE,
    SIZES,
    UNMATCHED,
    SampledCodec,
)
from teacher_cache.cache.codecs.temperatures import require_within
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.draws import MappedDraws, SampledTargets
from teacher_cache.stages.tokens.mapped_teacher import map_head
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection


@dataclass(frozen=True, kw_only=True)
class CachedTargets:
    """Positions as stored, decoded a run at a time: a whole support of all would fill the memory.

    Attributes:
        codec: of the cache; one of hidden states with its head, on the device of `stored`.
        stored: [N, ...] each, the codec's fields by name, expanded.
        temperature: at which teacher and student are compared.
        num_outcomes: of the student, at least the support's.
    """

    codec: AnyCodec
    stored: Mapping[str, Tensor]
    temperature: float
    num_outcomes: int

    def at_positions(self, where: slice) -> TeacherDistribution | SampledTargets:
        """The teacher at a run of positions.

        Raises:
            UserError: if the cache does not serve the temperature.
        """
        stored = {name: field[where] for name, field in self.stored.items()}
        if isinstance(self.codec, SampledCodec):
            return sampled_targets(self.codec, stored, self.temperature)
        decoded = self.codec.decode(stored, self.temperature)
        if decoded.ids is None:
            missing = self.num_outcomes - decoded.log_probs.shape[-1]
            return TeacherDistribution(
                log_probs=torch.nn.functional.pad(
                    decoded.log_probs, (0, missing), value=-torch.inf
                ),
                temperature=self.temperature,
            )
        return TeacherDistribution(
            log_probs=decoded.log_probs,
            head_ids=decoded.ids,
            tail_log_prob=decoded.tail_log_prob,
            temperature=self.temperature,
        )

    def unmatched_at(self, where: slice) -> Unmatched | None:
        """What of a drawn teacher has no id in the cache; None where all has one."""
        codec = self.codec
        if not isinstance(codec, SampledCodec) or not codec.has_unmatched:
            return None
        log_prob, drawn_log_prob = (
            self.stored[UNMATCHED][where][..., codec.temperatures.index(one)].float()
            for one in (self.temperature, codec.draw_temperature)
        )
        return Unmatched(
            log_prob=log_prob, drawn_log_prob=drawn_log_prob, num_draws=codec.num_draws
        )


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """The mass of a teacher that had no id when it was cached, at some positions.

    Attributes:
        log_prob: [...] nats, at the temperature that is compared at.
        drawn_log_prob: [...] nats, at that of the draws.
        num_draws: N of each position, those that met it included.
    """

    log_prob: Tensor
    drawn_log_prob: Tensor
    num_draws: int


def sampled_targets(
    codec: SampledCodec, stored: Mapping[str, Tensor], temperature: float
) -> SampledTargets:
    """Draws with the teacher's log-probs at a temperature, drawn from it at another.

    Not by `codec.decode`: its head shares its mass with a ghost, which the estimate has none of.

    Raises:
        UserError: if the temperature is not of the cache's grid.
    """
    codec.require_stored(temperature)
    log_probs = stored[LOG_PROBS].float()
    filled = is_filled(stored[SIZES].long(), log_probs.shape[-1])
    log_probs = torch.where(filled, log_probs, -torch.inf)
    drawn = SampledTargets(
        ids=masked_ids(unpack_ids(stored[IDS], stored.get(f"{IDS}_high")), filled),
        counts=torch.where(filled, stored[COUNTS].long(), 0),
        log_probs=log_probs,
        proposal_log_probs=log_probs,
        temperature=codec.draw_temperature,
        support_size=codec.support_size,
    )
    if temperature == codec.draw_temperature:
        return drawn
    lse, new_lse = (
        stored[LSE][..., codec.temperatures.index(one)].float()
        for one in (codec.draw_temperature, temperature)
    )
    return drawn.at_temperature(temperature, lse=lse, new_lse=new_lse)


def serves(codec: AnyCodec, temperature: float) -> bool:
    """Whether a cache of this codec can be decoded at a temperature."""
    try:
        require_temperature(codec, temperature)
    except UserError:
        return False
    return True


def require_temperature(codec: AnyCodec, temperature: float) -> None:
    """Refuse a temperature that the cache does not serve.

    Raises:
        UserError: naming its grid.
    """
    if isinstance(codec, SampledCodec):
        codec.require_stored(temperature)
    elif isinstance(codec, TopKCodec):
        require_within(temperature, codec.temperatures)


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
        found = self.cached.at_positions(where)
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
        if not isinstance(found, SampledTargets):
            return mapped
        return mapped_draws(found, self.fixed, mapped, self.cached.unmatched_at(where))


def mapped_draws(
    found: SampledTargets,
    fixed: FixedMap,
    head: TeacherDistribution,
    unmatched: Unmatched | None,
) -> MappedDraws:
    """Draws as the student's ids; those without one count for the ghost.

    Args:
        found: [..., D] of the cached ids.
        fixed: where those go.
        head: of the distinct drawn ids, mapped.
        unmatched: what of the teacher had no id when it was cached; None where all had one.
    """
    weights, student_ids = found.weights(), fixed.student_ids
    log_ghost = weights.new_full(weights.shape[:-1], -torch.inf)
    if unmatched is not None:  # then the draws with an id are not all
        num_with_id = found.counts.sum(dim=-1)
        weights = weights * (num_with_id / unmatched.num_draws).unsqueeze(-1)
        num_without = unmatched.num_draws - num_with_id
        ratio = unmatched.log_prob - unmatched.drawn_log_prob
        log_ghost = (num_without / unmatched.num_draws).to(weights.dtype).log() + ratio
    ids, log_weights, log_ghost = map_head(found.ids, weights.log(), log_ghost, student_ids)
    has_id = torch.cat([student_ids, student_ids.new_full((1,), -1)])[found.ids] >= 0
    counts = has_id & (weights != 0)
    ghost_weight = log_ghost.exp()
    # The ghost's own probability is known where it was stored, else as its draws say.
    of_ghost = log_ghost if unmatched is None else unmatched.log_prob
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


def head_of(found: TeacherDistribution | SampledTargets, *, num_ids: int) -> TeacherDistribution:
    """Positions as a head and its ghost, whatever the codec.

    Args:
        found: over the cached ids.
        num_ids: of the teacher's support; a whole distribution is a head of so many.
    """
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
