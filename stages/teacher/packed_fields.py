"""From what was kept of each position to the fields of a shard of packed samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.schema import SAMPLE_ID_BYTES, Fields, Ragged, language_model_schema
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.teacher.capture_positions import reduced_of


def packed_fields(
    codec: AnyCodec, samples: Sequence[PackedSample], values: Mapping[str, np.ndarray]
) -> Fields:
    """Each sample's positions in the codec's code, beside its tokens.

    Args:
        codec: of the cache.
        samples: of a shard.
        values: [N, ...] each, a reduction's arrays by name, of all samples end to end.
    """
    rows: list[dict[str, np.ndarray]] = []
    start = 0
    for sample in samples:
        stop = start + len(sample.input_ids)
        reduced = reduced_of(codec, {name: one[start:stop] for name, one in values.items()})
        rows.append({
            "input_ids": sample.input_ids,
            "segment": sample.segment,
            "loss_mask": sample.loss_mask,
            **codec.encode(reduced),  # pyright: ignore[reportArgumentType]
        })  # fmt: skip
        start = stop
    ids = b"".join(sample.sample_id for sample in samples)
    return {"sample_id": np.frombuffer(ids, f"V{SAMPLE_ID_BYTES}")} | {
        spec.name: Ragged.from_arrays(
            [row[spec.name] for row in rows], spec.dtype, spec.inner_shape
        )
        for spec in language_model_schema(codec.fields, is_packed=True)
        if spec.is_ragged
    }
