"""Draws from the teacher, the same ones whenever a sample is computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.ids import is_filled, masked_ids, unpack_ids
from teacher_cache.cache.codecs.sampled import (
    COUNTS,
    IDS,
    LOG_PROBS,
    LSE,
    SIZES,
    UNMATCHED,
    ReducedSampled,
    SampledCodec,
)
from teacher_cache.cache.codecs.temperatures import missing_temperature
from teacher_cache.stages.codecs.interface import (
    Drawn,
    Positions,
    Room,
    Sample,
    Unmatched,
    Unused,
)
from teacher_cache.stages.codecs.reductions import Chunk, in_chunks, on_host
from teacher_cache.stages.tokens.mapped_teacher import project_logits
from teacher_cache.stages.tokens.support import MappedSupport, Support

CHUNK_ELEMENTS = 2**22  # the cumulative sums are float64
DRAW_SEED = 0


class SampledRoom(Room[SampledCodec]):
    """`sampled`: an unbiased estimate of what is linear in the teacher's probabilities."""

    lacks = "it holds the ids that were drawn, and nothing of all others"

    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> SampledCodec:
        """Mass that has no id is stored where there can be any."""
        return SampledCodec(support_size=support_size, has_unmatched=has_unmatched, **given)

    def settings(self, codec: SampledCodec) -> dict[str, Any]:
        """The seed of all draws."""
        return {"draw_seed": DRAW_SEED}

    def reduce(
        self, codec: SampledCodec, support: Support, positions: Positions
    ) -> tuple[ReducedSampled, Unused]:
        """Draw at the codec's temperature, by inverting the distribution function."""
        at = _drawn(positions)
        return in_chunks(lambda chunk: _chunk(codec, chunk, at), support, positions, CHUNK_ELEMENTS)

    def reduce_mapped(
        self, codec: SampledCodec, support: MappedSupport, positions: Positions
    ) -> tuple[ReducedSampled, Unused]:
        """Draws from the mapped distribution; one of what no student id means has no slot.

        A draw from the teacher, mapped, is one from the mapped teacher: these are the draws of a
        cache that is not aligned.
        """
        at = _drawn(positions)
        return in_chunks(
            lambda chunk: _mapped_chunk(codec, support, chunk, at),
            support.teacher,
            positions,
            CHUNK_ELEMENTS,
        )

    def draws(self, codec: SampledCodec, sample_id: bytes, num_positions: int) -> np.ndarray:
        """[S, N] of the sample's own numbers."""
        return uniforms(sample_id, num_positions, codec.num_draws, seed=DRAW_SEED)

    def grid(self, codec: SampledCodec) -> tuple[float, ...]:
        """At which there are normalisers."""
        return codec.temperatures

    def require_temperature(self, codec: SampledCodec, temperature: float) -> None:
        """One of the grid: nothing interpolates."""
        codec.require_stored(temperature)

    def answer(
        self, codec: SampledCodec, stored: Mapping[str, Tensor], temperature: float
    ) -> Drawn:
        """The draws themselves: a decoded head shares its mass with a ghost, an estimate has none.

        Raises:
            UserError: if the temperature is not of the cache's grid.
        """
        codec.require_stored(temperature)
        log_probs = stored[LOG_PROBS].float()
        filled = is_filled(stored[SIZES].long(), log_probs.shape[-1])
        is_own = temperature == codec.draw_temperature
        return Drawn(
            ids=masked_ids(unpack_ids(stored[IDS], stored.get(f"{IDS}_high")), filled),
            counts=torch.where(filled, stored[COUNTS].long(), 0),
            log_probs=torch.where(filled, log_probs, -torch.inf),
            draw_temperature=codec.draw_temperature,
            temperature=temperature,
            support_size=codec.support_size,
            lse=None if is_own else _at(codec, stored[LSE], codec.draw_temperature),
            new_lse=None if is_own else _at(codec, stored[LSE], temperature),
            unmatched=Unmatched(
                log_prob=_at(codec, stored[UNMATCHED], temperature),
                drawn_log_prob=_at(codec, stored[UNMATCHED], codec.draw_temperature),
                num_draws=codec.num_draws,
            )
            if codec.has_unmatched
            else None,
        )

    def coarse_for(self, *, divergence: str, is_projected: bool) -> str | None:
        """The counts are unbiased for what is linear in the teacher's probabilities alone."""
        by = "--align projection" if is_projected else None
        if divergence != "kl":
            by = f"--divergence {divergence}"
        if by is None:
            return None
        return (
            f"the teacher is coarse: {by} takes the drawn ids with their exact probabilities, and "
            "one outcome for all others; the counts serve the forward KL alone"
        )

    def missing(self, source: SampledCodec, target: SampledCodec) -> str | None:
        """Other draws, or more temperatures."""
        kept = (source.num_draws, source.draw_temperature)
        if kept != (target.num_draws, target.draw_temperature):
            return "its draws are what they are, and the teacher is not there to draw again"
        return missing_temperature(source.temperatures, target.temperatures)

    def cut(
        self, source: SampledCodec, target: SampledCodec, sample: Sample
    ) -> dict[str, np.ndarray]:
        """The same draws, with the normalisers of fewer temperatures."""
        kept = [source.temperatures.index(temperature) for temperature in target.temperatures]
        fields = {spec.name: sample[spec.name] for spec in target.fields}
        return fields | {LSE: sample[LSE][:, kept]}


ROOM = SampledRoom()


def _drawn(positions: Positions) -> np.ndarray:
    if positions.drawn_at is None:
        raise ValueError("a sampled cache needs `drawn_at`, the uniform numbers of its draws")
    return positions.drawn_at


def _at(codec: SampledCodec, of_grid: Tensor, temperature: float) -> Tensor:
    """[...] float32 of [..., G]."""
    return of_grid[..., codec.temperatures.index(temperature)].float()


def uniforms(sample_id: bytes, num_positions: int, num_draws: int, *, seed: int) -> np.ndarray:
    """Numbers in [0, 1), [S, N] float64: a function of sample, position and seed alone.

    Position t's do not depend on how many positions follow, nor on batch, shard or device.
    """
    digest = hashlib.sha256(b"%d:" % seed + sample_id).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    return generator.random((num_positions, num_draws))


def draw(log_weights: Tensor, drawn_at: Tensor) -> Tensor:
    """Ids [N, D], each from its row's distribution; one of no mass is never drawn.

    Args:
        log_weights: [N, V], not normalised, at most about 0.
        drawn_at: [N, D] float64 in [0, 1).
    """
    # In float32 the sums could not tell a token of 1e-8 from none.
    cumulative = log_weights.double().exp_().cumsum(dim=1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    at = torch.minimum(drawn_at * total, below_total)
    return torch.searchsorted(cumulative, at.contiguous(), right=True)


def distinct(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct ids of each row, how often each stands there, and how many they are.

    Args:
        ids: [N, D] int64.

    Returns:
        [N, M] ids ascending, [N, M] counts, zeros in the empty slots, and [N] sizes.
    """
    ascending = ids.sort(dim=1).values
    is_new = torch.ones_like(ascending, dtype=torch.bool)
    is_new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    slots = is_new.long().cumsum(dim=1) - 1
    sizes = slots[:, -1] + 1
    width = int(sizes.max()) if len(sizes) else 1
    shape = (len(ids), width)
    found = ids.new_zeros(shape).scatter_(1, slots, ascending)
    counts = ids.new_zeros(shape).scatter_add_(1, slots, torch.ones_like(slots))
    return found, counts, sizes


def _chunk(codec: SampledCodec, chunk: Chunk, drawn_at: np.ndarray) -> ReducedSampled:
    below = chunk.below_max
    stop = chunk.start + len(below)
    at = torch.from_numpy(drawn_at[chunk.start : stop]).to(below.device)
    lse = torch.stack(
        [(below / temperature).logsumexp(dim=1) for temperature in codec.temperatures], dim=1
    )
    ids, counts, sizes = distinct(draw(below / codec.draw_temperature, at))
    normaliser = lse[:, codec.temperatures.index(codec.draw_temperature)]
    log_probs = below.gather(1, ids) / codec.draw_temperature - normaliser[:, None]
    return ReducedSampled(
        ids=on_host(ids),
        counts=on_host(counts),
        log_probs=on_host(log_probs),
        sizes=on_host(sizes),
        lse=on_host(lse),
        **chunk.always(),
    )


def _mapped_chunk(
    codec: SampledCodec, support: MappedSupport, chunk: Chunk, drawn_at: np.ndarray
) -> ReducedSampled:
    below, student_ids = chunk.below_max, support.student_ids.to(chunk.below_max.device)
    at = torch.from_numpy(drawn_at[chunk.start : chunk.start + len(below)]).to(below.device)
    scaled = [below / temperature for temperature in codec.temperatures]
    lse = torch.stack([one.logsumexp(dim=1) for one in scaled], dim=1)  # [n, G]
    is_unmatched = student_ids < 0
    unmatched = torch.stack([one[:, is_unmatched].logsumexp(dim=1) for one in scaled], dim=1) - lse
    at_draws = scaled[codec.temperatures.index(codec.draw_temperature)]
    drawn = student_ids[draw(at_draws, at)]
    # What has no student id sorts behind all that have one, and is then cut off.
    ids, counts, sizes = distinct(drawn.where(drawn >= 0, support.size))
    is_slot = ids < support.size
    has_none = ~is_slot & (counts > 0)
    mapped, _ = project_logits(at_draws, student_ids, num_rows=support.size)
    ids = ids.where(is_slot, 0)
    return ReducedSampled(
        ids=on_host(ids),
        counts=on_host(counts.where(is_slot, 0)),
        log_probs=on_host(mapped.gather(1, ids)),
        sizes=on_host(sizes - has_none.sum(dim=1)),
        lse=on_host(lse),
        unmatched=on_host(unmatched),
        **chunk.always(),
    )
