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
from teacher_cache.stages.losses.draws import SampledTargets


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
