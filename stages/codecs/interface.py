"""What the stages do with a codec: one room a codec, in the module of its name beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.codecs.interface import Codec, Decoded, Reduced
from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.tokens.support import MappedSupport, Support

Sample = Mapping[str, np.ndarray]
"""A sample's stored fields by name, as the reader gives them."""
Unused = np.ndarray
"""[N], the mass (T = 1) of what a support leaves out."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What a teacher said at N positions, before a codec keeps some of it.

    Attributes:
        logits: [N, R] float32, before temperature, of all rows of the teacher's head.
        next_ids: [N] int64, the real next tokens; `NO_LABEL` where there is none.
        states: [N, D], what the head read; None where nothing reads it.
        drawn_at: [N, draws] of `Room.draws`; None where nothing is drawn.
    """

    logits: Tensor
    next_ids: Tensor
    states: Tensor | None = None
    drawn_at: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """The mass of a teacher that had no id when it was cached, at some positions.

    Attributes:
        log_prob: [...] nats, at the temperature that is compared at.
        drawn_log_prob: [...] nats, at that of the draws.
        num_draws: N of each position, those that met it included.
    """

    log_prob: Tensor
    drawn_log_prob: Tensor
    num_draws: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Draws as a cache gives them back; `Decoded` and `Weighted` are what other codecs answer.

    Attributes:
        ids: [..., M] int64, distinct along M, -1 in an empty slot.
        counts: [..., M] int64, how often each was drawn, 0 in an empty slot.
        log_probs: [..., M] float32 nats at `draw_temperature`, -inf in an empty slot.
        draw_temperature: of what was drawn from.
        temperature: that was asked for.
        support_size: ids that could be drawn.
        lse: [...] float32, logsumexp of (z - z_max) / `draw_temperature` over the support, and
        new_lse: [...] the same at `temperature`; both None where that is the draws' own.
        unmatched: the mass that no id of the support has; None where it has all.
    """

    ids: Tensor
    counts: Tensor
    log_probs: Tensor
    draw_temperature: float
    temperature: float
    support_size: int
    lse: Tensor | None = None
    new_lse: Tensor | None = None
    unmatched: Unmatched | None = None


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Distinct ids that stand for the whole distribution between them, at one temperature.

    Attributes:
        ids: [..., M] int64, distinct along M, -1 in an empty slot, the most probable first.
        log_probs: [..., M] float32 nats; -inf in an empty slot.
        weights: [..., M] float32, the mass that each stands for, 0 in an empty slot: an unbiased
            estimate of the distribution.
        num_heads: [...] int64, the first of them, which were certain to be kept.
        head_log_probs: [..., M] and
        tail_log_prob: [...] the same ids as a head beside a ghost, which sum to 1.
        temperature: of all these.
        unmatched_log_prob: [...] nats, the log of the mass that no id of the support has.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor
    num_heads: Tensor
    head_log_probs: Tensor
    tail_log_prob: Tensor
    temperature: float
    unmatched_log_prob: Tensor


Answer = Decoded | Drawn | Weighted

C = TypeVar("C", bound=Codec)


class Room(ABC, Generic[C]):
    """What stages ask of a codec; every answer that is not its own is that of most codecs.

    Attributes:
        lacks: what a cache of it does not hold of the teacher's logits, for who wants another
            codec of it; None where it holds them all.
        needs: what it takes beyond all logits, that is what a cache of these lacks; or None.
        keeps_states: it holds states, so the teacher's head lies beside them.
        projects_in_place: a projected position takes no more place than its head.
    """

    lacks: ClassVar[str | None] = None
    needs: ClassVar[str | None] = None
    keeps_states: ClassVar[bool] = False
    projects_in_place: ClassVar[bool] = False

    # How it is made.

    def of(self, codec: Codec) -> Room[Any]:
        """The room of a codec of this name, where versions of it differ."""
        return self

    def former(self, codec: Codec, given: Mapping[str, Any]) -> Codec | None:
        """What an earlier release made of the same options; None where it is the same."""
        return None

    @abstractmethod
    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> C:
        """The codec for a teacher.

        Args:
            given: its attributes that options set.
            support_size: V.
            width: D of the states.
            has_unmatched: whether some of the teacher's mass may have no id of the support.

        Raises:
            UserError: for a value that the codec cannot have.
        """

    def check_mapped(self, given: Mapping[str, Any], *, num_reached: int, num_student: int) -> None:
        """Refuse settings that leave nothing of a teacher mapped to a student's ids.

        Args:
            given: as of `made`.
            num_reached: the student's ids that any of the teacher's maps to.
            num_student: all of the student's ids.

        Raises:
            UserError: saying what can be.
        """

    def settings(self, codec: C) -> dict[str, Any]:
        """What decides the cached values beside `codec.settings`, for the fingerprint."""
        return {}

    # What it keeps of a teacher.

    @abstractmethod
    def reduce(self, codec: C, support: Support, positions: Positions) -> tuple[Reduced, Unused]:
        """Reduce N positions, on the device, to what `codec.encode` takes.

        Raises:
            ValueError: if the positions lack states or draws that the codec needs.
            UserError: if logits are not finite.
        """

    def reduce_mapped(
        self, codec: C, support: MappedSupport, positions: Positions
    ) -> tuple[Reduced, Unused]:
        """The same over a student's ids: the whole distribution is mapped, then the codec cuts.

        It is mapped at each temperature by itself: the student's id has the sum of p_T over the
        teacher's ids that write its bytes. The log-probs of the teacher's first and of the real
        next token stay the teacher's own, over its own ids: its confidence, and how well it
        predicts its own tokens, do not depend on who learns from it.

        A codec stores one value an id and takes every temperature from it. That is exact where one
        teacher id maps to a student id, which is so of two byte-level vocabularies. Of several (a
        `<0x41>` beside an `A`) it is their sum at one temperature.

        Raises:
            ValueError: of a codec that holds whole distributions, or as `reduce` says.
            UserError: if logits are not finite, or nothing is left at a position.
        """
        raise ValueError(f"a {codec.name} cache holds whole distributions, which are not mapped")

    def draws(self, codec: C, sample_id: bytes, num_positions: int) -> np.ndarray | None:
        """Where each position of a sample draws, [S, draws] float64; None where nothing draws."""
        return None

    def head_of(self, model: PreTrainedModel) -> LanguageModelHead | None:
        """The teacher's whole head, which is cached with its states; None where none are.

        Raises:
            UserError: if the model has none that can be.
        """
        return None

    # How a cache of it is read.

    def opened(
        self,
        codec: C,
        *,
        cache: Path,
        manifest: Manifest,
        support: Support | None,
    ) -> C:
        """The codec ready to decode, with what it reads beside the shards, on the CPU.

        Args:
            codec: of the manifest.
            cache: its folder.
            manifest: of it.
            support: the ids that count, where they are not those of the file.

        Raises:
            UserError: if the cache lacks it.
            CheckFailed: if a file is damaged.
        """
        return codec

    def with_head(self, codec: C, head: LanguageModelHead) -> C:
        """The codec that decodes through a head."""
        return codec

    def to(self, codec: C, device: torch.device) -> C:
        """The codec that decodes on a device."""
        return codec

    def head_weight(self, codec: C) -> Tensor | None:
        """[V, D] of the head that an opened codec decodes through, or None."""
        return None

    def grid(self, codec: C) -> tuple[float, ...] | None:
        """The temperatures that were stored; None where any can be had."""
        return None

    def require_temperature(self, codec: C, temperature: float) -> None:
        """Refuse a temperature that a cache of it does not serve.

        Raises:
            UserError: naming its grid.
        """

    def answer(self, codec: C, stored: Mapping[str, Tensor], temperature: float) -> Answer:
        """What the losses compare the student with.

        Args:
            codec: opened, on the device of `stored`.
            stored: its fields of some positions, expanded.
            temperature: to compare at.

        Raises:
            UserError: if the cache does not serve it.
        """
        return codec.decode(stored, temperature)

    def coarse_for(self, *, divergence: str, is_projected: bool) -> str | None:
        """Said where a student is compared with less than the codec knows; None where it is not.

        Args:
            divergence: that is minimised.
            is_projected: whether a projection that learns brings it to the student's ids.
        """
        return None

    # How it becomes another.

    def missing(self, source: C, target: C) -> str | None:
        """What a cache lacks for other settings of the same codec; None where it holds all."""
        return self.lacks

    def logits(self, codec: C, sample: Sample, device: torch.device) -> Tensor:
        """[S, V] float32, before temperature, up to a constant a position; where it lacks none."""
        raise ValueError(f"a {codec.name} cache holds no logits")

    def cut(self, source: C, target: C, sample: Sample) -> dict[str, np.ndarray]:
        """A sample's fields under settings of the same codec that keep less of it.

        Only asked where `lacks` is not None and `missing` is.
        """
        raise ValueError(f"a {source.name} cache is not cut")
