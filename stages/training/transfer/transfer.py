"""What a student matches inside its teacher, batch by batch: layers, targets, terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from teacher_cache.stages.losses.objective import weighted_sum
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.losses.transfer.attention import attention_distance
from teacher_cache.stages.losses.transfer.config import AttentionLoss, TransferConfig
from teacher_cache.stages.losses.transfer.hidden import hidden_distance
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
        mask = batch["attention_mask"].bool()
        sources = self.position_map.sources(mask)
        attention = hidden = None
        if self.maps is not None:
            assert inside.mixers is not None, "they were asked for"
            total = self._map_distances(self.maps, inside.mixers, batch, sources)
            attention = total / max(1, totals.num_map_rows)
        if self.hidden is not None:
            assert inside.projected_hidden is not None, "they were asked for"
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

    def _map_distances(
        self,
        maps: MapTransfer,
        mixers: Sequence[RecordedMixer],
        batch: Mapping[str, Tensor],
        sources: Tensor,
    ) -> Tensor:
        """The sum over rows and layers."""
        if maps.pooled_row_only:
            rows = pooled_rows(sources, self.position_map)
        else:
            rows = torch.arange(sources.shape[1], device=sources.device).expand_as(sources)
        seq_idx = batch.get("seq_idx")
        allowed = allowed_pairs(sources, rows, is_causal=self.is_causal, seq_idx=seq_idx)
        distances: list[Tensor] = []
        for pair, name in zip(maps.pairs, maps.fields, strict=True):
            mixer = mixers[pair.student]
            found = mean_absolute_map(mixer, chosen_units(mixer, maps.num_channels), rows)
            if not len(batch[name]):  # a share without samples reads one all the same
                distances.append(0 * found.sum())
                continue
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
            distances.append(attention_distance(found, wanted, allowed, loss=maps.loss).sum())
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
