"""What the teacher says of an evaluation's positions: computed now, or read from a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import CONTINUES, NEXT_LOG_PROB
from teacher_cache.stages.codecs.named import open_codec, serves
from teacher_cache.stages.data.packing import PackedRow
from teacher_cache.stages.evaluation.models import TeacherModel
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.objective import Targets
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.training.batches import PackedCollator, PackedSamples, at
from teacher_cache.stages.training.targets import CachedTargets

TEMPERATURE = 1.0  # at which teacher and student are compared


class BatchReference(Protocol):
    """The teacher at the N counted positions of a batch."""

    def at_positions(self, where: slice, /) -> tuple[Targets, Tensor]:
        """Its distributions at n of them, and [n] its log-probs of the next tokens, nats."""
        ...


class Reference(Protocol):
    """The teacher at the positions of all rows."""

    @property
    def support(self) -> Support:
        """The ids that its distributions are over."""
        ...

    def of_batch(self, batch: np.ndarray, /) -> BatchReference:
        """The teacher at the counted positions of the rows of these indices, end to end."""
        ...


@dataclass(frozen=True, kw_only=True)
class LiveReference:
    """A teacher that is run over the rows.

    Attributes:
        teacher: on its device.
        rows: of its own tokens.
    """

    teacher: TeacherModel
    rows: Sequence[PackedRow]

    @property
    def support(self) -> Support:
        """Of the teacher's tokenizer."""
        return self.teacher.support

    def of_batch(self, batch: np.ndarray) -> BatchReference:
        """One forward pass of the base model."""
        rows = [self.rows[i] for i in batch]
        counted = torch.from_numpy(np.concatenate([row.loss_mask for row in rows]))
        states = self.teacher.states([row.input_ids for row in rows], [row.lengths for row in rows])
        following = torch.from_numpy(np.concatenate([row.next_ids for row in rows]))
        return _LiveBatch(
            teacher=self.teacher,
            states=states[counted.to(states.device)],
            next_ids=following.to(states.device),
        )


@dataclass(frozen=True, kw_only=True)
class _LiveBatch:
    teacher: TeacherModel
    states: Tensor
    next_ids: Tensor

    def at_positions(self, where: slice) -> tuple[Targets, Tensor]:
        below, _ = self.teacher.support.below_max(self.teacher.logits(self.states[where]))
        found = TeacherDistribution.from_logits(below, TEMPERATURE)
        next_ids = self.next_ids[where, None]
        return found, found.log_probs.gather(1, next_ids).squeeze(1)


class CachedSamples(Protocol):
    """Samples of a cache by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> dict[str, np.ndarray]: ...


class CachedReference:
    """What a cache kept of the teacher at each position of its samples.

    Args:
        samples: with their tokens, `segment`, `loss_mask` and the codec's fields.
        codec: of the cache; one of hidden states with its head, on the device.
        support: the ids that its distributions are over.
        device: where the positions are decoded.
    """

    def __init__(
        self, samples: CachedSamples, codec: Codec, support: Support, device: torch.device
    ):
        self._samples = samples
        self._codec = codec
        self.support = support
        self._device = device
        self._collator = PackedCollator(0, codec)
        self.rows = [_row(samples[i]) for i in range(len(samples))]

    @classmethod
    def of_cache(
        cls,
        reader: CacheReader,
        tokenizer: PreTrainedTokenizerBase,
        *,
        held_out: np.ndarray | None,
        device: torch.device,
    ) -> CachedReference:
        """Of the labelled split of a cache.

        Args:
            reader: of that split.
            tokenizer: of the students, whose ids the cached ones must be.
            held_out: [N] bool, which of its samples; all if none is given.
            device: where the positions are decoded.

        Raises:
            UserError: if its ids are others than the tokenizer's, or it cannot be decoded at
                temperature 1.
            CheckFailed: if its head is damaged or missing.
        """
        support = _support(reader, tokenizer)
        codec = _codec(reader, support, device)
        chosen = np.arange(len(reader)) if held_out is None else np.flatnonzero(held_out)
        return cls(PackedSamples(reader, chosen, labeled=True), codec, support, device)

    def of_batch(self, batch: np.ndarray) -> BatchReference:
        """Read the samples, and move what is stored to the device."""
        samples = [self._samples[int(i)] for i in batch]
        collated = self._collator(samples)
        mask = collated["loss_mask"]
        names = [spec.name for spec in self._codec.fields]
        stored = {name: at(collated[name], mask).to(self._device) for name in names}
        targets = CachedTargets(
            codec=self._codec,
            stored=stored,
            temperature=TEMPERATURE,
            num_outcomes=self.support.size,
        )
        return _CachedBatch(targets=targets, next_log_prob=stored[NEXT_LOG_PROB].float())


@dataclass(frozen=True, kw_only=True)
class _CachedBatch:
    targets: CachedTargets
    next_log_prob: Tensor

    def at_positions(self, where: slice) -> tuple[Targets, Tensor]:
        return self.targets.at_positions(where), self.next_log_prob[where]


def _row(sample: Mapping[str, np.ndarray]) -> PackedRow:
    names = ("input_ids", "segment", "loss_mask")
    continues = sample.get(CONTINUES)
    return PackedRow(
        **{name: np.asarray(sample[name]) for name in names},
        continues=None if continues is None else bool(continues),
    )


def _support(reader: CacheReader, tokenizer: PreTrainedTokenizerBase) -> Support:
    recorded = reader.manifest.settings["support"]
    support = Support.of_tokenizer(tokenizer, recorded["size"])
    if support.settings != recorded:
        raise UserError(
            f"--cache {reader.cache} holds distributions over other ids than the student's "
            "tokenizer has: give text with --data"
        )
    return support


def _codec(reader: CacheReader, support: Support, device: torch.device) -> Codec:
    codec = open_codec(reader, device, support=support)
    if not serves(codec, TEMPERATURE):
        raise UserError(
            f"--cache {reader.cache} cannot be decoded at temperature 1, at which students are "
            "compared with their teacher: give text with --data"
        )
    return codec
