"""What a language model trains on: packed sequences with what the cache knows at each position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.losses.objective import NO_LABEL
from teacher_cache.stages.training.batches import (
    Batch,
    CachedSamples,
    Expanding,
    layer_fields,
    stacked,
)

# Torch cannot index with these everywhere; their bits it can.
_SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32}


class PackedSamples(CachedSamples):
    """Samples of a language model's cache; labelled ones with their next tokens."""

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """A sample's fields, `segment` among them even where each is one document."""
        sample = dict(super().__getitem__(position))
        sample.setdefault("segment", np.zeros(len(sample["input_ids"]), np.uint16))
        return sample | {"next_ids": next_ids(sample)} if self.labeled else sample


def next_ids(sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each position's next token, int64 [S]; `NO_LABEL` where it is of another document, or none.

    Args:
        sample: with `input_ids` and `segment`, [S] each.
    """
    following = np.full(len(sample["input_ids"]), NO_LABEL, np.int64)
    same = sample["segment"][1:] == sample["segment"][:-1]
    following[:-1] = np.where(same, sample["input_ids"][1:].astype(np.int64), NO_LABEL)
    return following


class PackedCollator:
    """Stack samples of one kind into a batch, teacher's fields as stored.

    Returns `input_ids` [B, S] int64, `attention_mask` [B, S] int64, `seq_idx` [B, S] int32 (the
    document of each token), `loss_mask` [B, S] bool, the codec's fields [B, S, ...] and, of
    labelled samples, `next_ids` [B, S] int64; and the fields that `layers` makes of a sample,
    padded.

    Args:
        pad_id: fills `input_ids`.
        codec: of the cache.
        layers: what is matched inside the teacher, or none.
    """

    def __init__(self, pad_id: int, codec: AnyCodec, layers: Expanding | None = None):
        self._pad_id = pad_id
        self._codec = codec
        self._layers = layers

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Collate the samples."""
        input_ids, mask = pad_batch([sample["input_ids"] for sample in samples], self._pad_id)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask.astype(np.int64),
            # Padding belongs to the last document: it comes after it, so no document reads it.
            "seq_idx": stacked([sample["segment"].astype(np.int32) for sample in samples], "edge"),
            "loss_mask": stacked([sample["loss_mask"] for sample in samples]),
        }
        expanded = [self._codec.expand(sample) for sample in samples]
        arrays |= {name: stacked([one[name] for one in expanded]) for name in expanded[0]}
        if "next_ids" in samples[0]:
            # What padding holds is masked.
            arrays["next_ids"] = stacked([sample["next_ids"] for sample in samples])
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return batch | layer_fields(self._layers, samples)


def at(field: Tensor, mask: Tensor) -> Tensor:
    """A field [B, S, ...] at the positions of a mask [B, S]: [N, ...], whatever it is stored as."""
    bits = _SAME_BITS.get(field.dtype)
    return field[mask] if bits is None else field.view(bits)[mask].view(field.dtype)
