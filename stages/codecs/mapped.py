"""From a teacher's logits to what a codec keeps of them over a student's ids.

The whole distribution is mapped first, at each temperature by itself: the student's id has the sum
of p_T over the teacher's ids that write its bytes. Then the codec cuts. The log-probs of the
teacher's first and of the real next token stay the teacher's own, over its own ids: its confidence,
and how well it predicts its own tokens, do not depend on who learns from it.

A codec stores one value an id and takes every temperature from it. That is exact where one teacher
id maps to a student id, which is so of two byte-level vocabularies. Of several (a `<0x41>` beside
an `A`) it is their sum at T = 1, or at the temperature of the draws; elsewhere a `topk` cache keeps
the head's whole mass right, and the shares within it as the probe measures them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.sampled import ReducedSampled, SampledCodec
from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs import sampled as draws
from teacher_cache.stages.codecs.reductions import (
    Chunk,
    Unused,
    in_chunks,
    nucleus,
    on_host,
    sorted_head,
    tail_statistics,
)
from teacher_cache.stages.codecs.sampled import distinct, draw
from teacher_cache.stages.tokens.mapped_teacher import project_logits
from teacher_cache.stages.tokens.support import MappedSupport


def reduce_mapped_topk(
    codec: TopKCodec, support: MappedSupport, logits: Tensor, next_ids: Tensor
) -> tuple[ReducedTopK, Unused]:
    """The student's most probable ids, and as the tail all other mass, matched or not.

    Args:
        codec: says K, the nucleus and the temperatures.
        support: from the teacher's ids to the student's.
        logits: [N, R] of the teacher, before temperature.
        next_ids: [N] int64, the teacher's.

    Returns:
        What `codec.encode` takes, and [N] the mass of what the teacher's support leaves out.

    Raises:
        UserError: if logits are not finite, or at a position no student id has any mass.
    """
    return in_chunks(
        lambda chunk: _topk_chunk(codec, support, chunk),
        support.teacher,
        logits,
        next_ids,
        reductions.CHUNK_ELEMENTS,
    )


def reduce_mapped_sampled(
    codec: SampledCodec,
    support: MappedSupport,
    logits: Tensor,
    next_ids: Tensor,
    drawn_at: np.ndarray,
) -> tuple[ReducedSampled, Unused]:
    """Draws from the mapped distribution; one of what no student id means has no slot.

    A draw from the teacher, mapped, is one from the mapped teacher: these are the draws of a cache
    that is not aligned.

    Args:
        codec: says how many, at which temperature, and the grid.
        support: as of `reduce_mapped_topk`, like the rest.
        logits: [N, R].
        next_ids: [N].
        drawn_at: [N, draws] of `draws.uniforms`.

    Raises:
        UserError: if logits are not finite.
    """
    return in_chunks(
        lambda chunk: _sampled_chunk(codec, support, chunk, drawn_at),
        support.teacher,
        logits,
        next_ids,
        draws.CHUNK_ELEMENTS,
    )


def _topk_chunk(codec: TopKCodec, support: MappedSupport, chunk: Chunk) -> ReducedTopK:
    student_ids = support.student_ids.to(chunk.below_max.device)
    mapped, _ = project_logits(chunk.below_max, student_ids, num_rows=support.size)  # [n, V_s]
    ids = sorted_head(mapped, codec.top_k)
    head = mapped.gather(1, ids)
    first = head[:, 0]
    _refuse_nothing(first)
    sizes, kept = nucleus(codec, head)
    is_kept = torch.zeros_like(mapped, dtype=torch.bool).scatter_(1, ids, kept)
    is_member = is_kept.index_select(1, student_ids.clamp(min=0)) & (student_ids >= 0)  # [n, V_t]
    below = chunk.below_max - (first + chunk.lse)[:, None]  # the teacher's ids, below the head's
    tail = below.masked_fill(is_member, -torch.inf)
    tail_r, tail_m = tail_statistics(tail, codec.temperatures)
    below_first = head - first[:, None]
    if not support.is_one_to_one:
        true_r, true_m = tail_statistics(
            below.masked_fill_(~is_member, -torch.inf), codec.temperatures
        )
        found_r, found_m = tail_statistics(
            below_first.masked_fill(~kept, -torch.inf), codec.temperatures
        )
        tail_r += found_r - true_r
        tail_m = torch.where(torch.isneginf(tail_r), tail_m, tail_m + found_m - true_m)
    return ReducedTopK(
        ids=on_host(ids),
        below_max=on_host(below_first),
        tail_r=on_host(tail_r),
        tail_m=on_host(tail_m),
        sizes=None if sizes is None else on_host(sizes),
        first_log_prob=on_host(first),
        **chunk.always(),
    )


def _sampled_chunk(
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


def _refuse_nothing(first: Tensor) -> None:
    nothing = torch.isneginf(first)
    if bool(nothing.any()):
        raise UserError(
            f"at {int(nothing.sum())} positions the teacher rules out every token that the student "
            "has a string of, so nothing is left to map: leave --align out, or give another student"
        )
