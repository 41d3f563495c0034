"""Draws from the teacher, the same ones whenever a sample is computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.ids import is_filled, masked_ids, unpack_ids
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.sampled import (
    COUNTS,
    HEADS,
    IDS,
    LOG_PROBS,
    LSE,
    SIZES,
    TAIL_R,
    UNMATCHED,
    DistinctCodec,
    ReducedDistinct,
    ReducedSampled,
    SampledCodec,
    require_on_grid,
    with_ghost,
)
from teacher_cache.cache.codecs.temperatures import missing_temperature
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.codecs.interface import (
    Drawn,
    Positions,
    Room,
    Sample,
    Unmatched,
    Unused,
    Weighted,
)
from teacher_cache.stages.codecs.reductions import Chunk, in_chunks, on_host, sorted_head
from teacher_cache.stages.tokens.mapped_teacher import project_logits
from teacher_cache.stages.tokens.support import MappedSupport, Support

CHUNK_ELEMENTS = 2**22  # the cumulative sums are float64
DRAW_SEED = 0
NO_OTHER_DRAWS = "its draws are what they are, and the teacher is not there to draw again"


C = TypeVar("C", SampledCodec, DistinctCodec)


class DrawsRoom(Room[C]):
    """`sampled`: an unbiased estimate of what is linear in the teacher's probabilities."""

    lacks = "it holds the ids that were drawn, and nothing of all others"

    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> Any:
        """Of the second version, but for draws with replacement.

        Mass that has no id is stored where there can be any.
        """
        if "num_draws" not in given:
            return DistinctCodec(support_size=support_size, has_unmatched=has_unmatched, **given)
        if "num_ids" in given:
            raise UserError(
                "--num-draws are draws with replacement, --num-ids distinct ids: give one of both"
            )
        return SampledCodec(support_size=support_size, has_unmatched=has_unmatched, **given)

    def former(self, codec: Codec, given: Mapping[str, Any]) -> Codec | None:
        """Draws with replacement, where the options leave it open."""
        if given.keys() & {"num_draws", "num_ids"} or not isinstance(codec, DistinctCodec):
            return None
        return SampledCodec(
            support_size=codec.support_size,
            temperatures=codec.temperatures,
            draw_temperature=codec.draw_temperature,
            has_unmatched=codec.has_unmatched,
        )

    def of(self, codec: Codec) -> Room[Any]:
        """By its version."""
        return DISTINCT if isinstance(codec, DistinctCodec) else ROOM

    def settings(self, codec: C) -> dict[str, Any]:
        """The seed of all draws."""
        return {"draw_seed": DRAW_SEED}

    def grid(self, codec: C) -> tuple[float, ...]:
        """At which there are normalisers."""
        return codec.temperatures

    def require_temperature(self, codec: C, temperature: float) -> None:
        """One of the grid: nothing interpolates."""
        require_on_grid(temperature, codec.temperatures)


class SampledRoom(DrawsRoom[SampledCodec]):
    """The first version: draws with replacement."""

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

    def answer(
        self, codec: SampledCodec, stored: Mapping[str, Tensor], temperature: float
    ) -> Drawn:
        """The draws themselves: a decoded head shares its mass with a ghost, an estimate has none.

        Raises:
            UserError: if the temperature is not of the cache's grid.
        """
        require_on_grid(temperature, codec.temperatures)
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
            return NO_OTHER_DRAWS
        return missing_temperature(source.temperatures, target.temperatures)

    def cut(
        self, source: SampledCodec, target: SampledCodec, sample: Sample
    ) -> dict[str, np.ndarray]:
        """The same draws, with the normalisers of fewer temperatures."""
        kept = [source.temperatures.index(temperature) for temperature in target.temperatures]
        fields = {spec.name: sample[spec.name] for spec in target.fields}
        return fields | {LSE: sample[LSE][:, kept]}


class DistinctRoom(DrawsRoom[DistinctCodec]):
    """The second version: distinct ids, drawn so that as many estimate best."""

    def reduce(
        self, codec: DistinctCodec, support: Support, positions: Positions
    ) -> tuple[ReducedDistinct, Unused]:
        """A head of those that are certain, and systematic draws of the others."""
        at = _drawn(positions)
        return in_chunks(
            lambda chunk: _distinct_chunk(codec, chunk, at), support, positions, CHUNK_ELEMENTS
        )

    def reduce_mapped(
        self, codec: DistinctCodec, support: MappedSupport, positions: Positions
    ) -> tuple[ReducedDistinct, Unused]:
        """Of the mapped distribution; of what no student id means, the mass is kept."""
        at = _drawn(positions)
        return in_chunks(
            lambda chunk: _mapped_distinct_chunk(codec, support, chunk, at),
            support.teacher,
            positions,
            CHUNK_ELEMENTS,
        )

    def draws(self, codec: DistinctCodec, sample_id: bytes, num_positions: int) -> np.ndarray:
        """[S, 1 + M] of the sample's own numbers: where to draw, and how to round each."""
        return uniforms(sample_id, num_positions, 1 + codec.num_ids, seed=DRAW_SEED)

    def answer(
        self, codec: DistinctCodec, stored: Mapping[str, Tensor], temperature: float
    ) -> Weighted:
        """The ids with what each stands for, and as a head beside a ghost.

        Raises:
            UserError: if the temperature is not of the cache's grid.
        """
        kept = codec.kept(stored, temperature)
        head, tail = with_ghost(kept.log_probs, kept.is_whole)
        return Weighted(
            ids=kept.ids,
            log_probs=kept.log_probs.float(),
            weights=kept.log_weights.exp().float(),
            num_heads=stored[HEADS].long(),
            head_log_probs=head.float(),
            tail_log_prob=tail.float(),
            temperature=temperature,
            unmatched_log_prob=_at(codec, stored[UNMATCHED], temperature)
            if codec.has_unmatched
            else torch.full_like(tail.float(), -torch.inf),
        )

    def missing(self, source: DistinctCodec, target: DistinctCodec) -> str | None:
        """Other draws, or more temperatures."""
        kept = (source.num_ids, source.draw_temperature)
        if kept != (target.num_ids, target.draw_temperature):
            return NO_OTHER_DRAWS
        return missing_temperature(source.temperatures, target.temperatures)

    def cut(
        self, source: DistinctCodec, target: DistinctCodec, sample: Sample
    ) -> dict[str, np.ndarray]:
        """The same draws, with the masses of fewer temperatures."""
        kept = [source.temperatures.index(temperature) for temperature in target.temperatures]
        fields = {spec.name: sample[spec.name] for spec in target.fields}
        return fields | {
            name: sample[name][:, kept] for name in (TAIL_R, UNMATCHED) if name in fields
        }


ROOM = SampledRoom()
DISTINCT = DistinctRoom()


def _drawn(positions: Positions) -> np.ndarray:
    if positions.drawn_at is None:
        raise ValueError("a sampled cache needs `drawn_at`, the uniform numbers of its draws")
    return positions.drawn_at


def _at(codec: SampledCodec | DistinctCodec, of_grid: Tensor, temperature: float) -> Tensor:
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


ROUNDED_OFF = 1e-9
"""Of a tail, by which sums in float64 may be off: an id so near to being certain is."""


def draw_distinct(
    below_max: Tensor, num_ids: int, temperature: float, drawn_at: Tensor
) -> tuple[Tensor, Tensor]:
    """Distinct ids, each with probability `min(1, c p)`, `c` such that these sum to M.

    The unbiased estimate of p with M entries whose variance is least (Wangni et al. 2018, section
    3, arXiv:1710.09854), drawn systematically by one number a position: along the cumulated weights
    of all ids that are not certain, first those of the M most probable in order of probability,
    then all others in order of id. The most probable id is certain even where its `c p` is below 1,
    so that no position lacks it.

    Args:
        below_max: [n, V] float32, z_i - z_max, -inf at what cannot be drawn.
        num_ids: M, 2 to V.
        temperature: of p.
        drawn_at: [n] float64 in [0, 1).

    Returns:
        [n, M] ids, V in an empty slot, which there is where fewer than M ids have any mass; and
        [n], how many of the first are certain: the most probable ones, ties to the lower id.
    """
    top = sorted_head(below_max, num_ids)
    weights = (below_max / temperature).exp_()
    of_top = weights.gather(1, top).double()
    rest = weights.scatter_(1, top, 0.0).cumsum(dim=1, dtype=torch.float64)  # [n, V]
    num_heads, tail = _certain(of_top, rest[:, -1:])
    part = torch.arange(num_ids, device=top.device) - num_heads[:, None]  # [n, M], from 0
    near = of_top.masked_fill(part < 0, 0.0).cumsum(dim=1)  # [n, M]
    total = near[:, -1:] + rest[:, -1:]
    at = (drawn_at[:, None] + part) * (tail / (num_ids - num_heads).clamp(min=1))[:, None]
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    in_near = at < near[:, -1:]
    beyond = torch.nextafter(rest[:, -1:], torch.zeros_like(total)).minimum(at - near[:, -1:])
    places = torch.searchsorted(near, at.contiguous(), right=True).clamp(max=num_ids - 1)
    others = torch.searchsorted(rest, beyond.contiguous(), right=True)
    drawn = torch.where(in_near, top.gather(1, places), others)
    ids = torch.where(part < 0, top, torch.where(tail[:, None] > 0, drawn, below_max.shape[1]))
    return ids, num_heads


def _certain(of_top: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """[n], how many of the most probable ids are certain, and [n], the mass of all others.

    Args:
        of_top: [n, M] float64, weights, descending.
        rest: [n, 1], of all other ids together.
    """
    tails = torch.cat([of_top, rest], dim=1).flip(1).cumsum(dim=1).flip(1)  # from each id on
    num_left = torch.arange(of_top.shape[1], 0, -1, device=of_top.device)
    is_certain = num_left * of_top >= tails[:, :-1] * (1 - ROUNDED_OFF)
    is_certain[:, 0] = True
    num_heads = (is_certain & (of_top > 0)).long().cumprod(dim=1).sum(dim=1)
    return num_heads, tails.gather(1, num_heads[:, None])[:, 0]


def _distinct_chunk(codec: DistinctCodec, chunk: Chunk, drawn_at: np.ndarray) -> ReducedDistinct:
    at = torch.from_numpy(drawn_at[chunk.start : chunk.start + len(chunk.below_max)])
    always = chunk.always()
    return _distinct(codec, chunk.below_max, at.to(chunk.below_max.device), always, None)


def _mapped_distinct_chunk(
    codec: DistinctCodec, support: MappedSupport, chunk: Chunk, drawn_at: np.ndarray
) -> ReducedDistinct:
    below, student_ids = chunk.below_max, support.student_ids.to(chunk.below_max.device)
    at = torch.from_numpy(drawn_at[chunk.start : chunk.start + len(below)]).to(below.device)
    scaled = [below / temperature for temperature in codec.temperatures]
    unmatched = torch.stack(
        [one[:, student_ids < 0].logsumexp(dim=1) - one.logsumexp(dim=1) for one in scaled], dim=1
    )
    at_draws = scaled[codec.temperatures.index(codec.draw_temperature)]
    mapped, _ = project_logits(at_draws, student_ids, num_rows=support.size)
    largest = mapped.amax(dim=1, keepdim=True)
    mapped -= largest.masked_fill(torch.isneginf(largest), 0.0)
    mapped *= codec.draw_temperature
    return _distinct(codec, mapped, at, chunk.always(), unmatched)


def _distinct(
    codec: DistinctCodec,
    below: Tensor,
    drawn_at: Tensor,
    always: Mapping[str, np.ndarray],
    unmatched: Tensor | None,
) -> ReducedDistinct:
    """`below` [n, V] is overwritten."""
    size = below.shape[1]
    drawn, num_heads = draw_distinct(below, codec.num_ids, codec.draw_temperature, drawn_at[:, 0])
    ids = drawn.sort(dim=1).values
    taken = ids.clamp(max=size - 1)
    found = below.gather(1, taken).masked_fill(ids == size, -torch.inf)
    order = found.sort(dim=1, descending=True, stable=True).indices
    heads = torch.where(is_filled(num_heads, codec.num_ids), drawn, drawn[:, :1])
    below.scatter_(1, heads.clamp(max=size - 1), -torch.inf)  # what is left is the tail
    tail_r = torch.stack([(below / one).logsumexp(dim=1) for one in codec.temperatures], dim=1)
    return ReducedDistinct(
        ids=on_host(taken.gather(1, order).masked_fill(found.gather(1, order) == -torch.inf, 0)),
        below_max=on_host(found.gather(1, order)),
        num_heads=on_host(num_heads),
        tail_r=on_host(tail_r),
        rounding=on_host(drawn_at[:, 1:]),
        unmatched=None if unmatched is None else on_host(unmatched),
        **always,
    )
