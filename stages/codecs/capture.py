"""What is kept of a language-model teacher at each position: one reduction a codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from teacher_cache.cache.codecs.dense import DenseCodec, ReducedDense
from teacher_cache.cache.codecs.hidden import ReducedHidden
from teacher_cache.cache.codecs.interface import Reduced
from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.codecs.sampled import ReducedSampled, SampledCodec
from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.schema import SAMPLE_ID_BYTES, Fields, Ragged, language_model_schema
from teacher_cache.stages.codecs.mapped import (
    reduce_mapped_sampled,
    reduce_mapped_topk,
)
from teacher_cache.stages.codecs.reductions import (
    Unused,
    reduce_dense,
    reduce_hidden,
    reduce_topk,
)
from teacher_cache.stages.codecs.sampled import reduce_sampled
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.tokens.support import AnySupport, MappedSupport

_REDUCED: dict[str, type[Reduced]] = {
    "topk": ReducedTopK,
    "sampled": ReducedSampled,
    "hidden": ReducedHidden,
    "dense": ReducedDense,
}
_OF_DRAWS = ("ids", "counts", "log_probs")  # as wide as a slice's most distinct draws


def reduce_positions(
    codec: AnyCodec,
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
        next_ids: [N] int64, the real next tokens; -1 where there is none.
        states: [N, D], what the head read; for `hidden`.
        drawn_at: [N, draws] of `draws.uniforms`; for `sampled`.

    Returns:
        The reduction, and [N] the probability (T = 1) of what the support leaves out.

    Raises:
        ValueError: if `states` or `drawn_at` is missing, or a whole distribution is mapped.
        UserError: if logits are not finite.
    """
    if isinstance(support, MappedSupport):
        return _reduce_mapped(codec, support, logits, next_ids, drawn_at)
    if isinstance(codec, TopKCodec):
        return reduce_topk(codec, support, logits, next_ids)
    if isinstance(codec, DenseCodec):
        return reduce_dense(codec, support, logits, next_ids)
    if isinstance(codec, SampledCodec):
        return reduce_sampled(codec, support, logits, next_ids, _drawn(drawn_at))
    if states is None:
        raise ValueError("a hidden cache needs `states`, what the language-model head read")
    return reduce_hidden(states, support, logits, next_ids)


def _reduce_mapped(
    codec: AnyCodec,
    support: MappedSupport,
    logits: Tensor,
    next_ids: Tensor,
    drawn_at: np.ndarray | None,
) -> tuple[Reduced, Unused]:
    if isinstance(codec, TopKCodec):
        return reduce_mapped_topk(codec, support, logits, next_ids)
    if isinstance(codec, SampledCodec):
        return reduce_mapped_sampled(codec, support, logits, next_ids, _drawn(drawn_at))
    raise ValueError(f"a {codec.name} cache holds whole distributions, which are not mapped")


def _drawn(drawn_at: np.ndarray | None) -> np.ndarray:
    if drawn_at is None:
        raise ValueError("a sampled cache needs `drawn_at`, the uniform numbers of its draws")
    return drawn_at


def arrays_of(codec: AnyCodec, reduced: Reduced) -> dict[str, np.ndarray]:
    """A reduction's arrays [N, ...] by name, of shapes that depend on the codec and N alone."""
    arrays = {name: value for name, value in vars(reduced).items() if value is not None}
    if isinstance(codec, SampledCodec):
        for name in _OF_DRAWS:
            missing = codec.num_draws - arrays[name].shape[1]
            arrays[name] = np.pad(arrays[name], [(0, 0), (0, missing)])
    return arrays


def reduced_of(codec: AnyCodec, arrays: Mapping[str, np.ndarray]) -> Reduced:
    """The reduction of which `arrays_of` made these."""
    return _REDUCED[codec.name](**arrays)


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
