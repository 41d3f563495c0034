"""Which codec a cache can be converted to, and how the fields of a sample become that codec's.

From all logits (`dense`, and `hidden` through its head) a distribution is reduced as at capture.
What holds a part of it can be cut to less of the same, as its room does it. Nothing is made up:
what a codec needs and the cache does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS, Codec
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.codecs.interface import Sample
from teacher_cache.stages.codecs.measure import (
    NUM_POSITIONS,
    probed_temperatures,
    reconstruction_error,
)
from teacher_cache.stages.codecs.named import (
    codec_of,
    given_attributes,
    open_codec,
    room_named,
    room_of,
)
from teacher_cache.stages.config import refuse_foreign_options
from teacher_cache.stages.tokens.support import Support

Recode = Callable[[Sample], dict[str, np.ndarray]]
"""From a sample's stored fields to those of the target codec."""


def target_codec(config: CodecConfig, source: Codec) -> Codec:
    """The codec that the options ask for; of the source's own kind, what is not given is kept.

    Raises:
        UserError: for an option of another codec, a value that the codec cannot have, or a codec
            that needs what the source does not hold.
    """
    name, room = config.codec or source.name, room_of(source)
    refuse_foreign_options(config, task="lm", codec=name)
    if name != source.name:
        _require(source, name, room.lacks or room_named(name).needs)
        return codec_of(config, support_size=source.support_size, width=0)
    target = codec_from(source.settings | given_attributes(config, name))
    if target != source:
        _require(source, name, room.missing(source, target))
    return target


def _require(source: Codec, name: str, missing: str | None) -> None:
    if missing is not None:
        raise UserError(
            f"a {source.name} cache cannot become this {name} cache: {missing}; run pipe "
            f"cache-teacher --codec {name} with these options instead"
        )


@dataclass(frozen=True, kw_only=True)
class LogitsOf:
    """All logits of a sample's positions, out of a cache that has them.

    Attributes:
        codec: opened, on the device.
        device: where they are computed.
    """

    codec: Codec
    device: torch.device

    @classmethod
    def of(cls, reader: CacheReader, device: torch.device) -> LogitsOf | None:
        """Of a cache; None where its codec keeps no logits.

        Raises:
            CheckFailed: if the head of cached states is damaged.
        """
        codec = codec_from(reader.manifest.settings["codec"])
        if room_of(codec).lacks is not None:
            return None
        return cls(codec=open_codec(reader, device), device=device)

    def __call__(self, sample: Sample) -> Tensor:
        """[S, V] float32, before temperature, up to a constant a position."""
        return room_of(self.codec).logits(self.codec, sample, self.device)


def recode(source: Codec, target: Codec, logits_of: LogitsOf | None) -> Recode:
    """What makes the target's fields of a sample's; `target_codec` let the pair pass.

    Args:
        source: of the cache that is read.
        target: of the one that is written.
        logits_of: where the source keeps all logits.
    """
    if logits_of is not None:
        return lambda sample: _reduced(target, logits_of, sample)
    room = room_of(source)
    return lambda sample: room.cut(source, target, sample)


def drawn_at(codec: Codec, sample: Sample) -> np.ndarray | None:
    """Where each position draws: the numbers that capture took, since they are the sample's own."""
    sample_id = sample["sample_id"].tobytes()
    return room_of(codec).draws(codec, sample_id, len(sample["input_ids"]))


def _reduced(target: Codec, logits_of: LogitsOf, sample: Sample) -> dict[str, np.ndarray]:
    logits = logits_of(sample)
    reduced, _ = reduce_positions(
        target,
        Support(size=target.support_size),  # an id that it leaves out has a logit of -inf
        logits,
        torch.full((len(logits),), -1, device=logits.device),
        drawn_at=drawn_at(target, sample),
    )
    # These were computed from the teacher's own logits: nothing here knows them better.
    always = {spec.name: sample[spec.name] for spec in EVERY_CODECS_FIELDS}
    return target.encode(reduced) | always


UNUSED_MASS = "unused_mass"


def probed_again(
    target: Codec,
    convert: Recode,
    logits_of: LogitsOf | None,
    readers: Mapping[str, CacheReader],
) -> dict[str, Any]:
    """For the manifest: what the target's codec costs and loses beside the source's.

    The exact teacher is not there. Where the source keeps all logits, the target is compared with
    *them*, and `measured_against` says so; its own error against the teacher stays with
    `about.converted_from.probe`. Elsewhere nothing is measured, and only the size of the heads is
    counted.
    """
    positions = _first_positions(readers)
    if logits_of is None:
        counting = {spec.counted_by for spec in target.fields if spec.counted_by is not None}
        sizes = [
            convert(sample)[name].astype(np.int64)[counts]
            for name in counting
            for sample, counts in positions
        ]
        num_ids = float(np.concatenate(sizes).mean()) if sizes else None
        return {"reconstruction": [], "num_ids": num_ids, "measured_against": None}
    logits, draws = [], []
    for sample, counts in positions:
        where = np.flatnonzero(counts)
        logits.append(logits_of(sample)[torch.from_numpy(where).to(logits_of.device)])
        numbers = drawn_at(target, sample)
        draws.append(None if numbers is None else numbers[where])
    if not logits:
        return {"reconstruction": [], "measured_against": None}
    drawn = [one for one in draws if one is not None]
    errors = [
        reconstruction_error(
            target,
            Support(size=target.support_size),
            torch.cat(logits),
            temperature=temperature,
            drawn_at=np.concatenate(drawn) if drawn else None,
        ).to_json()
        for temperature in probed_temperatures(target)
    ]
    # Of rows that no token has, nothing is left in the source to measure.
    for error in errors:
        del error[UNUSED_MASS]
    return {"reconstruction": errors, "measured_against": logits_of.codec.name}


def _first_positions(readers: Mapping[str, CacheReader]) -> list[tuple[Sample, np.ndarray]]:
    """The first samples and, [S] bool, those of their positions that count, 128 in all."""
    found: list[tuple[Sample, np.ndarray]] = []
    left = NUM_POSITIONS
    for sample in islice(_samples(readers), NUM_POSITIONS):
        counts = sample["loss_mask"] & (np.cumsum(sample["loss_mask"]) <= left)
        if counts.any():
            found.append((sample, counts))
            left -= int(counts.sum())
        if not left:
            break
    return found


def _samples(readers: Mapping[str, CacheReader]) -> Iterator[Sample]:
    for reader in readers.values():
        for idx in range(len(reader)):
            yield reader.sample(idx)
