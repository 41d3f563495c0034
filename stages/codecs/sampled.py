"""Draws from the teacher, the same ones whenever a sample is computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.codecs.sampled import ReducedSampled, SampledCodec
from teacher_cache.stages.codecs.reductions import Chunk, Unused, in_chunks, on_host
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.tokens.support import Support

CHUNK_ELEMENTS = 2**22  # the cumulative sums are float64
DRAW_SEED = 0


def uniforms(sample_id: bytes, num_positions: int, num_draws: int, *, seed: int) -> np.ndarray:
    """Numbers in [0, 1), [S, N] float64: a function of sample, position and seed alone.

    Position t's do not depend on how many positions follow, nor on batch, shard or device.
    """
    digest = hashlib.sha256(b"%d:" % seed + sample_id).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    return generator.random((num_positions, num_draws))


def draws_of(codec: AnyCodec, samples: Sequence[PackedSample]) -> np.ndarray | None:
    """Where each position of the samples draws, [N, draws]; None for a codec that draws nothing."""
    if not isinstance(codec, SampledCodec):
        return None
    drawn = [
        uniforms(sample.sample_id, len(sample.input_ids), codec.num_draws, seed=DRAW_SEED)
        for sample in samples
    ]
    return np.concatenate([*drawn, np.empty((0, codec.num_draws))])


def reduce_sampled(
    codec: SampledCodec,
    support: Support,
    logits: Tensor,
    next_ids: Tensor,
    drawn_at: np.ndarray,
) -> tuple[ReducedSampled, Unused]:
    """Draw from the teacher at the codec's temperature, by inverting the distribution function.

    Args:
        codec: says how many, at which temperature, and the grid.
        support: ids that count.
        logits: [N, R], before temperature.
        next_ids: [N] int64, -1 where there is none.
        drawn_at: [N, draws] of `uniforms`.

    Returns:
        What `codec.encode` takes, and [N] the mass of what the support leaves out.

    Raises:
        UserError: if logits are not finite.
    """
    return in_chunks(
        lambda chunk: _sampled_chunk(codec, chunk, drawn_at),
        support,
        logits,
        next_ids,
        CHUNK_ELEMENTS,
    )


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


def _sampled_chunk(codec: SampledCodec, chunk: Chunk, drawn_at: np.ndarray) -> ReducedSampled:
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
