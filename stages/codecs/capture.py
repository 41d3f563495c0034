"""What is kept of a language-model teacher at each position, and how samples hold it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from teacher_cache.cache.codecs.interface import Codec, Reduced
from teacher_cache.cache.schema import (
    CONTINUES,
    SAMPLE_ID_BYTES,
    Fields,
    Ragged,
    language_model_schema,
)
from teacher_cache.stages.codecs.interface import Positions, Unused
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.codecs.reductions import joined
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.tokens.support import AnySupport, MappedSupport


def reduce_positions(
    codec: Codec,
    support: AnySupport,
    logits: Tensor,
    next_ids: Tensor,
    *,
    states: Tensor | None = None,
    drawn_at: np.ndarray | None = None,
) -> tuple[Reduced, Unused]:
    """Reduce N positions to what `codec.encode` takes; a slice of the result is a sample's.

    Args:
        codec: decides what is kept.
        support: ids that count.
        logits: [N, R] float32, before temperature, of all rows of the teacher's head.
        next_ids: [N] int64, the real next tokens; `NO_LABEL` where there is none.
        states: [N, D], what the head read, for a codec that keeps it.
        drawn_at: [N, draws] of `draws_of`, for a codec that draws.

    Returns:
        The reduction, and [N] the probability (T = 1) of what the support leaves out.

    Raises:
        ValueError: if `states` or `drawn_at` is missing, or a whole distribution is mapped.
        UserError: if logits are not finite.
    """
    room = room_of(codec)
    positions = Positions(logits=logits, next_ids=next_ids, states=states, drawn_at=drawn_at)
    if isinstance(support, MappedSupport):
        return room.reduce_mapped(codec, support, positions)
    return room.reduce(codec, support, positions)


def draws_of(codec: Codec, samples: Sequence[PackedSample]) -> np.ndarray | None:
    """Where each position of the samples draws, [N, draws]; None for a codec that draws nothing."""
    room = room_of(codec)
    drawn = [
        numbers
        for sample in samples
        if (numbers := room.draws(codec, sample.sample_id, len(sample.input_ids))) is not None
    ]
    return np.concatenate(drawn) if drawn else None


def packed_fields(
    codec: Codec,
    samples: Sequence[PackedSample],
    pieces: Sequence[Sequence[Reduced]],
    *,
    has_continues: bool = False,
    at_counted: bool = False,
) -> Fields:
    """Each sample's positions in the codec's code, beside its tokens.

    Args:
        codec: of the cache.
        samples: of a shard.
        pieces: of each sample, reductions of its positions that are spoken of, in their order.
        has_continues: as of the schema.
        at_counted: the same.

    Raises:
        UserError: if a value cannot be stored.
    """
    rows = [
        {
            "input_ids": sample.input_ids,
            "segment": sample.segment,
            "loss_mask": sample.loss_mask,
            **codec.encode(joined(reduced)),
        }
        for sample, reduced in zip(samples, pieces, strict=True)
    ]
    ids = b"".join(sample.sample_id for sample in samples)
    fields: Fields = {"sample_id": np.frombuffer(ids, f"V{SAMPLE_ID_BYTES}")}
    if has_continues:
        fields[CONTINUES] = np.array([sample.continues for sample in samples], dtype=bool)
    return fields | {
        spec.name: Ragged.from_arrays(
            [row[spec.name] for row in rows], spec.dtype, spec.inner_shape
        )
        for spec in language_model_schema(codec.fields, is_packed=True, at_counted=at_counted)
        if spec.is_ragged
    }
