"""All logits: every temperature can be had, and every other codec but that of states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.dense import LOGITS, DenseCodec, ReducedDense
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs.interface import Positions, Room, Sample, Unused
from teacher_cache.stages.codecs.reductions import in_chunks, on_host
from teacher_cache.stages.tokens.support import Support


class DenseRoom(Room[DenseCodec]):
    """`dense`: the support's logits, in float16."""

    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> DenseCodec:
        """Of the support's size; nothing else is to choose."""
        return DenseCodec(support_size=support_size)

    def reduce(
        self, codec: DenseCodec, support: Support, positions: Positions
    ) -> tuple[ReducedDense, Unused]:
        """The support's logits relative to the largest."""
        return in_chunks(
            lambda chunk: ReducedDense(below_max=on_host(chunk.below_max), **chunk.always()),
            support,
            positions,
            reductions.CHUNK_ELEMENTS,
        )

    def logits(self, codec: DenseCodec, sample: Sample, device: torch.device) -> Tensor:
        """As they were stored."""
        return torch.from_numpy(np.array(sample[LOGITS], np.float32)).to(device)


ROOM = DenseRoom()
