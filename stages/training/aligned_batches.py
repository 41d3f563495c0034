"""Packed samples for a student of another tokenizer: its tokens, the teacher where the two meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.join.aligned_sample import NO_POSITION, AlignedSample, SampleAligner
from teacher_cache.stages.training.batches import Batch
from teacher_cache.stages.training.packed_batches import PackedSamples, next_ids, stacked

SUMS = ("num_bytes", "num_teacher_bytes", "teacher_nll")
"""Of a sample, for what is measured per byte of text."""


class AlignedSamples(PackedSamples):
    """Samples of a language model's cache with their text read again.

    `lengths` are the teacher's, which order batches as well.

    Args:
        reader: of the split.
        sample_idxs: [N] which of its samples, in this order.
        labeled: whether the student's next tokens are learned.
        aligner: of the two tokenizers.
        is_spans: compare distributions only where both sides' next tokens are the same bytes, too.
    """

    def __init__(
        self,
        reader: CacheReader,
        sample_idxs: np.ndarray,
        *,
        labeled: bool,
        aligner: SampleAligner,
        is_spans: bool,
    ):
        super().__init__(reader, sample_idxs, labeled=labeled)
        self._aligner = aligner
        self._is_spans = is_spans

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The cached fields as they are, and under `aligned` what the student reads."""
        sample = super().__getitem__(position)
        aligned = self._aligner(sample)
        if self._is_spans:
            kept = np.where(aligned.is_one_to_one, aligned.teacher_positions, NO_POSITION)
        else:
            kept = aligned.teacher_positions
        counts = (kept >= 0) & sample["loss_mask"][np.maximum(kept, 0)]
        found = {
            "cached": sample,
            "aligned": aligned,
            "teacher_positions": np.where(counts, kept, NO_POSITION),
        }
        return found | {"next_ids": next_ids(vars(aligned))} if self.labeled else found


class AlignedCollator:
    """Stack samples of one kind into a batch.

    Returns what `PackedCollator` does, [B, S] over the student's tokens: `loss_mask` is True where
    the student has a next token, `has_teacher` [B, S] where the cached fields are those of the
    teacher's position that has read the same bytes. Besides, `following_ids` [B, S] int64 (the next
    tokens, learned or not), `chunk_index` [B, S] int64, `teacher_chunks` [B, C] float32,
    `chunk_mask` [B, C] bool, and of each sample `num_bytes`, `num_teacher_bytes` and `teacher_nll`.
    """

    def __init__(self, pad_id: int, codec: AnyCodec):
        self._pad_id = pad_id
        self._codec = codec

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Collate the samples."""
        aligned: list[AlignedSample] = [_not_empty(one["aligned"], self._pad_id) for one in samples]
        input_ids, mask = pad_batch([one.input_ids for one in aligned], self._pad_id)
        following = [next_ids(vars(one)) for one in aligned]
        positions = [
            one["teacher_positions"] if len(one["teacher_positions"]) else np.full(1, NO_POSITION)
            for one in samples
        ]
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask.astype(np.int64),
            "seq_idx": stacked([one.segment.astype(np.int32) for one in aligned], "edge"),
            "loss_mask": stacked([one >= 0 for one in following]),
            "has_teacher": stacked([one >= 0 for one in positions]),
            "following_ids": stacked(following),
            "chunk_index": stacked([one.chunk_index + 1 for one in aligned]) - 1,  # behind: -1
            "teacher_chunks": stacked([one.teacher_chunks for one in aligned]),
            "chunk_mask": stacked([np.ones(len(one.teacher_chunks), bool) for one in aligned]),
        }
        expanded = [self._codec.expand(one["cached"]) for one in samples]
        arrays |= {
            name: stacked([
                one[name][np.maximum(where, 0)]
                for one, where in zip(expanded, positions, strict=True)
            ])
            for name in expanded[0]
        }  # fmt: skip
        if "next_ids" in samples[0]:
            arrays["next_ids"] = arrays["following_ids"]
        for name in SUMS:
            arrays[name] = np.array([getattr(one, name) for one in aligned], np.float64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _not_empty(sample: AlignedSample, pad_id: int) -> AlignedSample:
    """A sample of which the student's tokenizer leaves nothing, as one token that predicts none."""
    if len(sample.input_ids):
        return sample
    return AlignedSample(
        **vars(sample)
        | {
            "input_ids": np.full(1, pad_id, np.uint32),
            "segment": np.zeros(1, np.uint16),
            "chunk_index": np.full(1, -1, np.int64),
        }
    )
