"""What a cache holds of a teacher's layers, and how batches of it are made."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from teacher_cache.cache.codecs.attention import (
    AttentionCodec,
    attention_field,
    attention_from,
    decode_rows,
)
from teacher_cache.cache.codecs.hidden import HIDDEN
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.losses.config import LAST_STATES, TransferConfig
from teacher_cache.stages.processes import num_processes
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.training.auxiliaries import LayerProjections
from teacher_cache.stages.training.config import ArchitectureConfig
from teacher_cache.stages.training.layers import (
    AttentionTransfer,
    HiddenTransfer,
    Transfer,
    layer_pairs,
    shown,
)
from teacher_cache.stages.training.terms import AttentionMaps, HiddenStates, LayersAlone, Term

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CachedLayers:
    """The layers that a training matches, as its cache holds them.

    Attributes:
        config: weights of what is matched.
        is_causal: whether the student sees nothing behind a position.
        codec: of the maps; None where none are matched.
        maps: None where none are matched.
        hidden: None where none are matched.
    """

    config: TransferConfig
    is_causal: bool
    codec: AttentionCodec | None
    maps: AttentionTransfer | None
    hidden: HiddenTransfer | None

    @classmethod
    def of(
        cls, config: TransferConfig, student: ArchitectureConfig, reader: CacheReader
    ) -> CachedLayers | None:
        """Those that the settings ask for; None where nothing is matched.

        Raises:
            UserError: if the cache lacks them, they are of no use to the student, or several
                processes are to train in stages.
        """
        if not config.transfers:
            return None
        if config.transfer_schedule != "together" and num_processes() > 1:
            # Data parallelism waits for a gradient of every weight that the forward pass used, and
            # one of zeros would let weight decay and momentum move what its stage leaves alone.
            raise UserError(
                f"--transfer-schedule {config.transfer_schedule} trains in one process, and "
                f"torchrun started {num_processes()}: start one, or give --transfer-schedule "
                "together"
            )
        codec = _codec(config, student, reader) if config.attention_weight else None
        return cls(
            config=config,
            is_causal=not student.bidirectional,
            codec=codec,
            maps=None if codec is None else _maps(config, student, codec),
            hidden=_hidden(config, student, reader) if config.hidden_weight else None,
        )._checked(student, reader)

    def _checked(self, student: ArchitectureConfig, reader: CacheReader) -> CachedLayers:
        """Itself.

        Raises:
            UserError: where layers are to learn alone and are no copies, or the cache lacks some;
                and where maps are matched with mixers that have none.
        """
        if self.maps is not None and student.attention_layers:
            raise UserError(
                "--attention-weight matches mixing matrices of scans, and --layers keeps attention "
                "in some layers: leave one of the two out"
            )
        if not self._is_layerwise:
            return self
        if not student.copies_teacher:
            raise UserError(
                "--transfer-schedule layerwise feeds each layer its teacher's state, and the "
                "student's layers are not its teacher's: give --init teacher, or another schedule"
            )
        assert self.hidden is not None, "the options were checked"
        cached = {pair.teacher for pair in self.hidden.pairs}
        if cached != set(range(student.num_layers)):
            raise UserError(
                f"--transfer-schedule layerwise needs the states behind all {student.num_layers} "
                f"layers, and {reader.cache} holds those of {len(cached)}: make a cache with "
                "--hidden all"
            )
        return self

    @property
    def hidden_widths(self) -> dict[int, int]:
        """D of the states that each layer of the student is matched with, by layer."""
        if self.hidden is None:
            return {}
        pairs = zip(self.hidden.pairs, self.hidden.widths, strict=True)
        return {pair.student: width for pair, width in pairs}

    def say(self) -> None:
        """Log which layers are matched; those by proportion stand nowhere else."""
        for name, matched in (("attention maps", self.maps), ("hidden states", self.hidden)):
            if matched is not None:
                logger.info(
                    "%s matched, student's layer to teacher's: %s", name, shown(matched.pairs)
                )

    def terms(self, position_map: PositionMap) -> list[Term]:
        """What a student with this position map learns of them."""
        transfer = self.transfer(position_map)
        terms: list[Term] = [] if self.maps is None else [AttentionMaps(transfer=transfer)]
        if self.hidden is None:
            return terms
        kind = LayersAlone if self._is_layerwise else HiddenStates
        return [*terms, kind(transfer=transfer)]

    @property
    def _is_layerwise(self) -> bool:
        return self.config.transfer_schedule == "layerwise"

    def projections(self, d_model: int, *, seed: int) -> list[LayerProjections]:
        """What learns beside a student of this width: none where states are matched as they are."""
        if self.hidden is None or self._is_layerwise:
            return []
        return [LayerProjections(d_model, widths=self.hidden_widths, seed=seed)]

    def transfer(self, position_map: PositionMap) -> Transfer:
        """What is matched, for a student with this position map."""
        return Transfer(
            config=self.config,
            position_map=position_map,
            is_causal=self.is_causal,
            maps=self.maps,
            hidden=self.hidden,
        )

    def expand(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A sample's fields as batches are stacked of: maps as codes, [S], [S, S] or [H, S, S]."""
        fields: dict[str, np.ndarray] = {}
        if self.codec is not None and self.maps is not None:
            for name in set(self.maps.fields):
                fields[name] = _codes(self.codec, sample, name)
        if self.hidden is not None:
            fields |= {name: sample[name] for name in set(self.hidden.fields)}
        return fields


def _codec(
    config: TransferConfig, student: ArchitectureConfig, reader: CacheReader
) -> AttentionCodec:
    codec = attention_from(reader.manifest.settings)
    if codec is None:
        raise UserError(
            f"--attention-weight {config.attention_weight:g} needs the teacher's attention maps, "
            f"and {reader.cache} holds none: make a cache with `pipe cache-teacher --attention "
            "mean`, or leave the option out"
        )
    if codec.mode == "cls" and student.pooling == "mean":
        raise UserError(
            f"{reader.cache} holds of each attention map the row of the position that the teacher "
            "pools at (--attention cls), and a student of --pooling mean pools at none: give "
            "--pooling cls, or make a cache with --attention mean"
        )
    return codec


def _maps(
    config: TransferConfig, student: ArchitectureConfig, codec: AttentionCodec
) -> AttentionTransfer:
    num_channels = student.expand * student.d_model
    if student.arch == "mamba" and config.attention_channels > num_channels:
        raise UserError(
            f"--attention-channels {config.attention_channels} of a Mamba-1 that has "
            f"{num_channels} (--expand {student.expand} times --d-model {student.d_model}): give "
            "at most as many"
        )
    pairs = layer_pairs(
        codec.layers,
        student.num_layers,
        config.attention_layer_map,
        option="--attention-layer-map",
    )
    return AttentionTransfer(
        pairs=pairs,
        fields=tuple(attention_field(pair.teacher) for pair in pairs),
        loss=config.attention_loss,
        num_channels=config.attention_channels,
        decode=decode_rows,
        teacher_is_causal=codec.is_causal,
        pooled_row_only=codec.mode == "cls",
    )


def _hidden(
    config: TransferConfig, student: ArchitectureConfig, reader: CacheReader
) -> HiddenTransfer:
    found = {
        int(match.group(1)): spec
        for spec in reader.manifest.schema
        if (match := re.fullmatch(rf"{HIDDEN}_(\d+)", spec.name))
    }
    cached = sorted(found)
    # Not those of the codec `hidden`, which are its distributions.
    if "last" in reader.manifest.settings.get("hidden", "").split(","):
        found[LAST_STATES] = next(one for one in reader.manifest.schema if one.name == HIDDEN)
        cached.append(LAST_STATES)
    if not found:
        raise UserError(
            f"--hidden-weight {config.hidden_weight:g} needs hidden states of the teacher's "
            f"layers, and {reader.cache} holds none: make a cache with `pipe cache-teacher "
            "--hidden` and the numbers of layers or last, 0,1,last say, or leave the option out"
        )
    pairs = layer_pairs(
        cached, student.num_layers, config.hidden_layer_map, option="--hidden-layer-map"
    )
    specs = [found[pair.teacher] for pair in pairs]
    return HiddenTransfer(
        pairs=pairs,
        fields=tuple(spec.name for spec in specs),
        widths=tuple(spec.inner_shape[0] for spec in specs),
    )


def _codes(codec: AttentionCodec, sample: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A sample's codes, 0 between its documents."""
    size = len(sample["input_ids"])
    lengths = [size]
    if codec.is_packed:  # segments are runs
        begins = np.flatnonzero(np.diff(sample["segment"].astype(np.int64))) + 1
        lengths = np.diff(np.array([0, *begins.tolist(), size])).tolist()
    pieces: Sequence[np.ndarray] = codec.split(sample[name], lengths)
    blocks = [codec.expand(one, length) for one, length in zip(pieces, lengths, strict=True)]
    if len(blocks) == 1:
        return blocks[0]
    whole = np.zeros((*blocks[0].shape[:-2], size, size), np.uint8)
    start = 0
    for block, length in zip(blocks, lengths, strict=True):
        span = slice(start, start + length)
        whole[..., span, span] = block
        start += length
    return whole
