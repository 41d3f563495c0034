"""What a student matches inside its teacher, batch by batch: layers, targets, terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from teacher_cache.stages.losses.config import AttentionLoss, TransferConfig
from teacher_cache.stages.losses.layers import attention_distance, hidden_distance
from teacher_cache.stages.losses.objective import weighted_sum
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.student.mixing_matrices import chosen_units, mean_absolute_map
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.scans.recorded import RecordedMixer
from teacher_cache.stages.training.transfer.layer_map import LayerPair
from teacher_cache.stages.training.transfer.schedule import Schedule, Term
from teacher_cache.stages.training.transfer.teacher_maps import (
    Decode,
    allowed_pairs,
    pooled_rows,
    targets,
)


class Inside(Protocol):
    """What a student's forward gives of its inside, in the student's order.

    Attributes:
        mixers: what each layer's scans ran with.
        projected_hidden: [B, S', D] by layer, its output in the teacher's width.
    """

    mixers: Sequence[RecordedMixer] | None
    projected_hidden: Mapping[int, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class MapTransfer:
    """How attention maps are matched.

    Attributes:
        pairs: of layers.
        fields: the batch's field of each pair.
        loss: what is measured.
        num_channels: of a Mamba-1.
        decode: of what is stored.
        teacher_is_causal: whether the teacher looks at nothing behind a position.
        pooled_row_only: what is stored is the row that the teacher's class is read from.
    """

    pairs: tuple[LayerPair, ...]
    fields: tuple[str, ...]
    loss: AttentionLoss
    num_channels: int
    decode: Decode
    teacher_is_causal: bool
    pooled_row_only: bool


@dataclass(frozen=True, kw_only=True)
class HiddenTransfer:
    """How hidden states are matched.

    Attributes:
        pairs: of layers.
        fields: the batch's field of each pair.
        widths: D of each pair's field.
    """

    pairs: tuple[LayerPair, ...]
    fields: tuple[str, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TransferTerms:
    """One micro-batch's share of its optimizer step's terms; scalars, None where a term is off."""

    attention: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MatchedRows:
    """Rows of one layer's map in the student's order, R of the S' positions of each sample.

    Attributes:
        pair: of layers.
        student: [B, R, S'] mean of `|M|`, not normalised; carries the gradient.
        teacher: [B, R, S'] what they are matched with, each row's sum 1, or 0 where the teacher has
            none; None where the batch is a share without samples.
        allowed: [B, R, S'] bool, entries that exist for both.
    """

    pair: LayerPair
    student: Tensor
    teacher: Tensor | None
    allowed: Tensor


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """All that is matched inside.

    Attributes:
        config: weights.
        schedule: what each step trains.
        position_map: of the student.
        is_causal: whether the student sees nothing behind a position.
        maps: None where no maps are matched.
        hidden: None where no hidden states are.
    """

    config: TransferConfig
    schedule: Schedule = field(default_factory=Schedule)
    position_map: PositionMap = field(default_factory=PositionMap)
    is_causal: bool = True
    maps: MapTransfer | None = None
    hidden: HiddenTransfer | None = None

    @property
    def requests(self) -> dict[str, bool]:
        """What to ask the student's forward for."""
        return {} if self.maps is None else {"output_mixers": True}

    def counted(self, totals: StepTotals, batch: Mapping[str, Tensor]) -> StepTotals:
        """A micro-batch's totals with its rows and states."""
        num_positions = int(batch["attention_mask"].sum())
        rows = states = 0
        if self.maps is not None:
            num = len(batch["attention_mask"]) if self.maps.pooled_row_only else num_positions
            rows = num * len(self.maps.pairs)
        if self.hidden is not None:
            states = num_positions * len(self.hidden.pairs)
        return replace(totals, num_map_rows=rows, num_hidden_states=states)

    def terms(
        self, inside: Inside, batch: Mapping[str, Tensor], totals: StepTotals
    ) -> TransferTerms:
        """A micro-batch's shares.

        Args:
            inside: of the student's forward on it.
            batch: with the teacher's fields, in its order; of a share without samples, 0 of them.
            totals: of the whole optimizer step.
        """
        attention = hidden = None
        if self.maps is not None:
            assert inside.mixers is not None, "they were asked for"
            total = self._map_distances(self.maps, inside.mixers, batch)
            attention = total / max(1, totals.num_map_rows)
        if self.hidden is not None:
            assert inside.projected_hidden is not None, "they were asked for"
            sources = self.position_map.sources(batch["attention_mask"].bool())
            total = _hidden_distances(self.hidden, inside.projected_hidden, batch, sources)
            hidden = total / max(1, totals.num_hidden_states)
        return TransferTerms(attention=attention, hidden=hidden)

    def loss(self, terms: TransferTerms, others: Tensor, step: int) -> Tensor:
        """The weighted sum of what a step trains, gradients and all.

        Args:
            terms: of the micro-batch.
            others: its share of the loss without them.
            step: of the optimizer, counted from 0.
        """
        weighted: tuple[tuple[Term, float, Tensor | None], ...] = (
            ("others", 1.0, others),
            ("attention", self.config.attention_weight, terms.attention),
            ("hidden", self.config.hidden_weight, terms.hidden),
        )
        trained = self.schedule.terms(step)
        return weighted_sum(
            (weight, value)
            for name, weight, value in weighted
            if value is not None and name in trained
        )

    def rows(self, sources: Tensor) -> Tensor:
        """The student's positions whose rows of the maps are matched, [B, R] int64.

        Args:
            sources: [B, S'] of the position map.
        """
        assert self.maps is not None, "maps are matched"
        if self.maps.pooled_row_only:
            return pooled_rows(sources, self.position_map)
        return torch.arange(sources.shape[1], device=sources.device).expand_as(sources)

    def map_rows(
        self, mixers: Sequence[RecordedMixer], batch: Mapping[str, Tensor]
    ) -> Iterator[MatchedRows]:
        """Both sides of each matched layer's map, one layer after the other.

        Args:
            mixers: of the student's forward on the batch.
            batch: as `terms` takes it.
        """
        maps = self.maps
        assert maps is not None, "maps are matched"
        sources = self.position_map.sources(batch["attention_mask"].bool())
        rows = self.rows(sources)
        seq_idx = batch.get("seq_idx")
        allowed = allowed_pairs(sources, rows, is_causal=self.is_causal, seq_idx=seq_idx)
        for pair, name in zip(maps.pairs, maps.fields, strict=True):
            mixer = mixers[pair.student]
            found = mean_absolute_map(mixer, chosen_units(mixer, maps.num_channels), rows)
            wanted = None
            if len(batch[name]):
                with torch.no_grad():
                    wanted = targets(
                        batch[name],
                        sources,
                        rows,
                        allowed,
                        decode=maps.decode,
                        teacher_is_causal=maps.teacher_is_causal,
                        seq_idx=seq_idx,
                    )
            yield MatchedRows(pair=pair, student=found, teacher=wanted, allowed=allowed)

    def _map_distances(
        self, maps: MapTransfer, mixers: Sequence[RecordedMixer], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum over rows and layers."""
        distances = [
            # A share without samples reads one all the same.
            0 * one.student.sum()
            if one.teacher is None
            else attention_distance(one.student, one.teacher, one.allowed, loss=maps.loss).sum()
            for one in self.map_rows(mixers, batch)
        ]
        return torch.stack(distances).sum()


def _hidden_distances(
    hidden: HiddenTransfer,
    projected: Mapping[int, Tensor],
    batch: Mapping[str, Tensor],
    sources: Tensor,
) -> Tensor:
    """The sum over positions and layers."""
    distances: list[Tensor] = []
    for pair, name in zip(hidden.pairs, hidden.fields, strict=True):
        num = len(batch[name])  # 0 in a share without samples
        states = projected[pair.student][:num]
        distances.append(hidden_distance(states, batch[name], sources[:num]).sum())
    return torch.stack(distances).sum()
