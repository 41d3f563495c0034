"""What a student matches inside its teacher, batch by batch: layers, targets, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.config import LAST_STATES, AttentionLoss, TransferConfig
from teacher_cache.stages.losses.layers import (
    added_distance,
    attention_distance,
    hidden_distance,
    normalised_rows,
)
from teacher_cache.stages.student.backbone import MambaStudentModel
from teacher_cache.stages.student.mixing_matrices import chosen_units, mean_absolute_mixing
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.scans.recorded import RecordedMixer


class LayerPair(NamedTuple):
    """A layer of the student and the cached one that it matches, both counted from 0.

    The teacher's may be `LAST_STATES`.
    """

    student: int
    teacher: int


def layer_pairs(
    cached: Sequence[int],
    num_layers: int,
    given: Sequence[tuple[int, int]] = (),
    *,
    option: str,
) -> tuple[LayerPair, ...]:
    """The pairs that are matched.

    Unless they are given, layer i of n goes to round(i m / n) of the m cached, both counted from
    1: the last to the last, the others in proportion. A half goes to the even number, and a layer
    that rounds to 0 lies below the first cached one and matches none.

    Args:
        cached: the teacher's layers in the cache, counted from 0, ascending, then `LAST_STATES` if
            it holds them; at least one.
        num_layers: n of the student.
        given: pairs of a student's and a teacher's layer, counted from 0; none for the default.
        option: that gives them, for a message.

    Raises:
        UserError: for a layer that the student or the cache does not have, or that is given twice.
    """
    if not given:
        num = len(cached)
        nearest = [round(i * num / num_layers) for i in range(1, num_layers + 1)]
        return tuple(LayerPair(i, cached[k - 1]) for i, k in enumerate(nearest) if k)
    for student, teacher in given:
        if student >= num_layers:
            raise UserError(
                f"{option} {shown(given)} names layer {student} of the student, which has "
                f"{num_layers}, 0 to {num_layers - 1}: name one of these"
            )
        if teacher not in cached:
            there = ", ".join(map(_name, cached))
            raise UserError(
                f"{option} {shown(given)} names layer {_name(teacher)} of the teacher, and the "
                f"cache holds {there}: name one of these, or make a cache with that layer"
            )
    if len({student for student, _ in given}) < len(given):
        raise UserError(
            f"{option} {shown(given)} names a layer of the student twice: give each one partner"
        )
    return tuple(LayerPair(*pair) for pair in given)


def shown(pairs: Sequence[tuple[int, int]]) -> str:
    """As the options write pairs: `0:1,3:last`."""
    return ",".join(f"{student}:{_name(teacher)}" for student, teacher in pairs)


def _name(layer: int) -> str:
    return "last" if layer == LAST_STATES else str(layer)


Stage = Literal["attention", "hidden", "others"]
ALL: frozenset[Stage] = frozenset(("attention", "hidden", "others"))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stages of whole steps; MOHAWK's order (Bick et al. 2024, section 3, arXiv:2408.10189).

    Attributes:
        attention_until: steps below it match attention maps alone.
        hidden_until: further steps below it match hidden states alone; those behind it train all
            other terms.
        is_staged: False: every step trains all terms.
    """

    attention_until: int = 0
    hidden_until: int = 0
    is_staged: bool = False

    @classmethod
    def of(cls, config: TransferConfig, num_steps: int) -> Schedule:
        """The stages of a training.

        Args:
            config: weights and shares.
            num_steps: optimizer steps of the whole training.
        """
        if config.transfer_schedule == "together":
            return cls()
        of_attention, of_hidden = config.transfer_shares
        first = round(of_attention * num_steps) if config.attention_weight else 0
        second = round(of_hidden * num_steps) if config.hidden_weight else 0
        return cls(attention_until=first, hidden_until=first + second, is_staged=True)

    def stages(self, step: int) -> frozenset[Stage]:
        """Of which stages a step trains the terms; steps count from 0."""
        if not self.is_staged:
            return ALL
        if step < self.attention_until:
            return frozenset(("attention",))
        return frozenset(("hidden",) if step < self.hidden_until else ("others",))


Decode = Callable[[Tensor, Tensor], Tensor]
"""From stored entries [..., n] and what each row reaches, [..., n] bool, to rows that sum to 1."""


def pooled_rows(sources: Tensor, position_map: PositionMap) -> Tensor:
    """The student's position that the class is read from: the last real one, [B, 1] int64.

    Args:
        sources: [B, S'] of `position_map`.
        position_map: an appended token is the last one.
    """
    last_mapped = (sources >= 0).sum(dim=1, keepdim=True) - 1
    return last_mapped if position_map.token_id is None else last_mapped + 1


def allowed_pairs(
    sources: Tensor, rows: Tensor, *, is_causal: bool, seq_idx: Tensor | None = None
) -> Tensor:
    """Which entries of the student's map have a counterpart in the teacher's.

    Args:
        sources: [B, S'] where each position comes from; negative: nowhere.
        rows: [B, R] int64, the student's positions whose rows are matched.
        is_causal: whether the student sees nothing behind a position.
        seq_idx: [B, S'] document of each position, or none; no pair crosses a border.

    Returns:
        [B, R, S'] bool.
    """
    exists = sources >= 0
    allowed = exists[:, None].expand(-1, rows.shape[1], -1)
    if is_causal:
        allowed = allowed & (torch.arange(sources.shape[1], device=rows.device) <= rows[..., None])
    if seq_idx is not None:
        allowed = allowed & (seq_idx.gather(1, rows)[..., None] == seq_idx[:, None])
    return allowed


def reordered(maps: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    """A batch of square maps with both axes in the student's order, some rows of it.

    Args:
        maps: [B, S, S] or [B, H, S, S], whatever they are stored as.
        sources: [B, S'].
        rows: [B, R] int64, the student's positions.

    Returns:
        [B, R, S'] or [B, H, R, S']; what stands where a source is negative means nothing.
    """
    of_rows, of_columns = sources.gather(1, rows).clamp(min=0), sources.clamp(min=0)
    batch = torch.arange(len(maps), device=maps.device)[:, None, None]
    index = (batch, of_rows[:, :, None], of_columns[:, None])
    if maps.ndim == 3:
        return maps[index]
    return maps.movedim(1, -1)[index].movedim(-1, 1)


def targets(
    stored: Tensor,
    sources: Tensor,
    rows: Tensor,
    allowed: Tensor,
    *,
    decode: Decode,
    teacher_is_causal: bool,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The teacher's rows as the student is to match them.

    Args:
        stored: [B, S, S] the mean over heads, [B, H, S, S] all of them, or [B, S] the row of the
            position that the teacher's class is read from.
        sources: [B, S'].
        rows: [B, R] int64, the student's positions; R is 1 for stored [B, S].
        allowed: [B, R, S'] bool, of `allowed_pairs`.
        decode: of what is stored.
        teacher_is_causal: whether the teacher looks at nothing behind a position.
        seq_idx: [B, S'] document of each position, or none; the teacher crosses no border.

    Returns:
        [B, R, S'] float32; a row sums to 1 over `allowed`, or is 0 where nothing of it is left or
        the teacher has no such row.
    """
    if stored.ndim == 2:
        row = stored.gather(1, sources.clamp(min=0))[:, None]  # [B, 1, S']
        return normalised_rows(decode(row, (sources >= 0)[:, None]), allowed)
    of_rows = sources.gather(1, rows)[..., None]  # [B, R, 1]
    reach = (of_rows >= 0) & (sources >= 0)[:, None]
    if teacher_is_causal:
        reach = reach & (sources[:, None] <= of_rows)
    if seq_idx is not None:
        reach = reach & (seq_idx.gather(1, rows)[..., None] == seq_idx[:, None])
    maps = reordered(stored, sources, rows)
    if stored.ndim == 4:  # the mean over heads first, as if it had been stored
        return normalised_rows(decode(maps, reach[:, None].expand(maps.shape)).mean(1), allowed)
    return normalised_rows(decode(maps, reach), allowed)


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
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

    @property
    def by_pair(self) -> Iterator[tuple[LayerPair, str]]:
        """Each pair and its field."""
        return zip(self.pairs, self.fields, strict=True)


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
        position_map: of the student.
        is_causal: whether the student sees nothing behind a position.
        maps: None where no maps are matched.
        hidden: None where no hidden states are.
    """

    config: TransferConfig
    position_map: PositionMap = field(default_factory=PositionMap)
    is_causal: bool = True
    maps: AttentionTransfer | None = None
    hidden: HiddenTransfer | None = None

    def num_attention_rows(self, batch: Mapping[str, Tensor]) -> int:
        """Rows of maps that a micro-batch matches, over all layers."""
        assert self.maps is not None, "maps are matched"
        mask = batch["attention_mask"]
        num = len(mask) if self.maps.pooled_row_only else int(mask.sum())
        return num * len(self.maps.pairs)

    def num_hidden_states(self, batch: Mapping[str, Tensor]) -> int:
        """States that a micro-batch matches, over all layers."""
        assert self.hidden is not None, "states are matched"
        return int(batch["attention_mask"].sum()) * len(self.hidden.pairs)

    def rows(self, sources: Tensor) -> Tensor:
        """The student's positions whose rows of the maps are matched, [B, R] int64.

        Args:
            sources: [B, S'] of the position map.
        """
        assert self.maps is not None, "maps are matched"
        if self.maps.pooled_row_only:
            return pooled_rows(sources, self.position_map)
        return torch.arange(sources.shape[1], device=sources.device).expand_as(sources)

    def attention_rows(
        self, mixers: Sequence[RecordedMixer], batch: Mapping[str, Tensor]
    ) -> Iterator[MatchedRows]:
        """Both sides of each matched layer's map, one layer after the other.

        Args:
            mixers: of the student's forward on the batch.
            batch: with the teacher's fields, in its order; of a share without samples, 0 of them.
        """
        maps = self.maps
        assert maps is not None, "maps are matched"
        sources = self.position_map.sources(batch["attention_mask"].bool())
        rows = self.rows(sources)
        seq_idx = batch.get("seq_idx")
        allowed = allowed_pairs(sources, rows, is_causal=self.is_causal, seq_idx=seq_idx)
        for pair, name in zip(maps.pairs, maps.fields, strict=True):
            mixer = mixers[pair.student]
            found = mean_absolute_mixing(mixer, chosen_units(mixer, maps.num_channels), rows)
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

    def attention_distances(
        self, mixers: Sequence[RecordedMixer], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum over rows and layers; the arguments are those of `attention_rows`."""
        assert self.maps is not None, "maps are matched"
        distances = [
            # A share without samples reads one all the same.
            0 * one.student.sum()
            if one.teacher is None
            else attention_distance(
                one.student, one.teacher, one.allowed, loss=self.maps.loss
            ).sum()
            for one in self.attention_rows(mixers, batch)
        ]
        return torch.stack(distances).sum()

    def hidden_distances(
        self, projected: Mapping[int, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum over positions and layers.

        Args:
            projected: [B, S', D] by layer of the student, its output in the teacher's width.
            batch: as `attention_rows` takes it.
        """
        assert self.hidden is not None, "states are matched"
        sources = self.position_map.sources(batch["attention_mask"].bool())
        distances: list[Tensor] = []
        for pair, name in self.hidden.by_pair:
            num = len(batch[name])  # 0 in a share without samples
            states = projected[pair.student][:num]
            distances.append(hidden_distance(states, batch[name], sources[:num]).sum())
        return torch.stack(distances).sum()

    def distances_alone(self, backbone: MambaStudentModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Of each layer that is fed the teacher's state before it, the sum over positions.

        Args:
            backbone: of the student, whose layers are the teacher's.
            batch: with the states behind all of the teacher's layers, in its order.
        """
        assert self.hidden is not None, "states are matched"
        behind = {pair.teacher: batch[name] for pair, name in self.hidden.by_pair}
        before = {i + 1: one for i, one in behind.items() if i + 1 in behind}
        real = batch["attention_mask"].bool()
        fed = backbone.fed(
            before, batch["input_ids"], batch["attention_mask"], batch.get("seq_idx")
        )
        distances = [
            added_distance(made[real], behind[i][real], given[real]).sum()
            for i, (given, made) in fed.items()
        ]
        return torch.stack(distances).sum()
