"""States before the language-model head, which lies in the cache once and gives logits again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.codecs.hidden import HIDDEN, HiddenCodec, ReducedHidden
from teacher_cache.cache.codecs.interface import Reduced
from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs.interface import Positions, Room, Sample, Unused
from teacher_cache.stages.codecs.reductions import in_chunks, on_host
from teacher_cache.stages.models.head import LanguageModelHead, read_language_model_head
from teacher_cache.stages.tokens.support import Support


class HiddenRoom(Room[HiddenCodec]):
    """`hidden`: whatever decodes opens it with its head."""

    needs = "it holds logits, not the states that gave them"
    keeps_states = True

    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> HiddenCodec:
        """Of the states' width; it gets its head where it decodes."""
        return HiddenCodec(support_size=support_size, width=width)

    def reduce(
        self, codec: HiddenCodec, support: Support, positions: Positions
    ) -> tuple[ReducedHidden, Unused]:
        """States as they are, beside the log-probs that every codec keeps."""
        if positions.states is None:
            raise ValueError("a hidden cache needs `states`, what the language-model head read")
        reduced, unused = in_chunks(
            lambda chunk: Reduced(**chunk.always()), support, positions, reductions.CHUNK_ELEMENTS
        )
        return ReducedHidden(hidden=on_host(positions.states.float()), **vars(reduced)), unused

    def head_of(self, model: PreTrainedModel) -> LanguageModelHead:
        """As measured, since states say nothing without all of it."""
        return LanguageModelHead.measured(model)

    def opened(
        self,
        codec: HiddenCodec,
        *,
        cache: Path,
        manifest: Manifest,
        support: Support | None,
    ) -> HiddenCodec:
        """With the cache's head, its rows those of the support where one is given."""
        head = read_language_model_head(cache, manifest)
        return replace(codec, head=head if support is None else head.of_support(support))

    def with_head(self, codec: HiddenCodec, head: LanguageModelHead) -> HiddenCodec:
        """As it says."""
        return replace(codec, head=head)

    def to(self, codec: HiddenCodec, device: torch.device) -> HiddenCodec:
        """With its head there, in float32."""
        head: Any = codec.head
        return codec if head is None else replace(codec, head=head.to(device))

    def head_weight(self, codec: HiddenCodec) -> Tensor | None:
        """The rows of the head that it was opened with."""
        head: Any = codec.head
        return None if head is None else head.weight

    def logits(self, codec: HiddenCodec, sample: Sample, device: torch.device) -> Tensor:
        """Through the head."""
        assert codec.head is not None, "it was opened"
        states = torch.from_numpy(np.array(sample[HIDDEN], np.float32)).to(device)
        with torch.inference_mode():
            return codec.head(states)


ROOM = HiddenRoom()
