"""Which codec a cache can be converted to, and how the fields of a sample become that codec's.

From all logits (`dense`, and `hidden` through its head) a distribution is reduced as at capture. A
sorted head is cut by taking its first ids as they are stored, and by adding what is cut to the
tail: so the ids that stay keep their probabilities. Nothing is made up: what a codec needs and the
cache does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.dense import LOGITS, DenseCodec
from teacher_cache.cache.codecs.hidden import HIDDEN, HiddenCodec
from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS
from teacher_cache.cache.codecs.named import AnyCodec, codec_from
from teacher_cache.cache.codecs.sampled import LSE, SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.codecs.options import (
    OPTIONS_OF,
    codec_of,
    given_options,
    refuse_foreign_options,
)
from teacher_cache.stages.codecs.probe import (
    NUM_POSITIONS,
    probed_temperatures,
    reconstruction_error,
)
from teacher_cache.stages.codecs.sampled import DRAW_SEED, uniforms
from teacher_cache.stages.codecs.topk import cut_head
from teacher_cache.stages.models.head import read_language_model_head
from teacher_cache.stages.tokens.support import Support

Sample = Mapping[str, np.ndarray]
Recode = Callable[[Sample], dict[str, np.ndarray]]
"""From a sample's stored fields to those of the target codec."""


def target_codec(config: CodecConfig, source: AnyCodec) -> AnyCodec:
    """The codec that the options ask for; of the source's own kind, what is not given is kept.

    Raises:
        UserError: for an option of another codec, a value that the codec cannot have, or a codec
            that needs what the source does not hold.
    """
    name = config.codec or source.name
    refuse_foreign_options(config, name)
    if name != source.name:
        _require(source, name, _missing_of_kind(source, name))
        return codec_of(config, support_size=source.support_size, width=0)
    given = {
        OPTIONS_OF[name][option]: getattr(config, option)
        for option in given_options(config)
        if option != "codec"
    }
    target = codec_from(source.settings | given)
    _require(source, name, _missing_of_same(source, target))
    return target


def _require(source: AnyCodec, name: str, missing: str | None) -> None:
    if missing is not None:
        raise UserError(
            f"a {source.name} cache cannot become this {name} cache: {missing}; run pipe "
            f"cache-teacher --codec {name} with these options instead"
        )


def _missing_of_kind(source: AnyCodec, name: str) -> str | None:
    """What another codec needs beyond all logits, or a source that has not even these."""
    holds = {
        "topk": "it holds the most probable ids, and of all others only their mass",
        "sampled": "it holds the ids that were drawn, and nothing of all others",
    }
    if name == "hidden":
        holds["dense"] = "it holds logits, not the states that gave them"
    return holds.get(source.name)


def _missing_of_same(source: AnyCodec, target: AnyCodec) -> str | None:
    if isinstance(source, TopKCodec) and isinstance(target, TopKCodec):
        return _missing_of_head(source, target)
    if isinstance(source, SampledCodec) and isinstance(target, SampledCodec):
        kept = (source.num_draws, source.draw_temperature)
        if kept != (target.num_draws, target.draw_temperature):
            return "its draws are what they are, and the teacher is not there to draw again"
        return _missing_temperature(source.temperatures, target.temperatures)
    return None


def _missing_of_head(source: TopKCodec, target: TopKCodec) -> str | None:
    if target.top_k > source.top_k:
        return f"it holds {source.top_k} ids a position, fewer than --top-k {target.top_k}"
    if target.is_exact and not source.is_exact:
        return "its log-probs are rounded to a byte each, and --exact asks for two"
    if source.top_p is not None and (target.top_p is None or target.top_p > source.top_p):
        return f"its heads end at the mass {source.top_p:g}"
    return _missing_temperature(source.temperatures, target.temperatures)


def _missing_temperature(there: tuple[float, ...], asked: tuple[float, ...]) -> str | None:
    for temperature in asked:
        if temperature not in there:
            grid = ", ".join(f"{one:g}" for one in there)
            return f"temperature {temperature:g} is not one of its grid ({grid})"
    return None


@dataclass(frozen=True, kw_only=True)
class LogitsOf:
    """All logits of a sample's positions, out of a cache that has them.

    Attributes:
        codec: `dense`, or `hidden` with its head on the device.
        device: where they are computed.
    """

    codec: DenseCodec | HiddenCodec
    device: torch.device

    @classmethod
    def of(
        cls, codec: AnyCodec, cache: Path, manifest: Manifest, device: torch.device
    ) -> LogitsOf | None:
        """Of a cache's codec; None where it keeps no logits.

        Raises:
            CheckFailed: if the head of cached states is damaged.
        """
        if isinstance(codec, HiddenCodec):
            head = read_language_model_head(cache, manifest).to(device)
            return cls(codec=replace(codec, head=head), device=device)
        return cls(codec=codec, device=device) if isinstance(codec, DenseCodec) else None

    def __call__(self, sample: Sample) -> Tensor:
        """[S, V] float32, before temperature, up to a constant a position."""
        if isinstance(self.codec, DenseCodec):
            return torch.from_numpy(np.array(sample[LOGITS], np.float32)).to(self.device)
        assert self.codec.head is not None
        states = torch.from_numpy(np.array(sample[HIDDEN], np.float32)).to(self.device)
        with torch.inference_mode():
            return self.codec.head(states)


def recode(source: AnyCodec, target: AnyCodec, logits_of: LogitsOf | None) -> Recode:
    """What makes the target's fields of a sample's; `target_codec` let the pair pass.

    Args:
        source: of the cache that is read.
        target: of the one that is written.
        logits_of: where the source keeps all logits.
    """
    if logits_of is not None:
        return lambda sample: _reduced(target, logits_of, sample)
    if isinstance(source, TopKCodec):
        assert isinstance(target, TopKCodec)
        return lambda sample: cut_head(source, target, sample)
    assert isinstance(source, SampledCodec) and isinstance(target, SampledCodec)
    kept = [source.temperatures.index(temperature) for temperature in target.temperatures]
    fields = [spec.name for spec in target.fields]
    return lambda sample: {name: sample[name] for name in fields} | {LSE: sample[LSE][:, kept]}


def drawn_at(codec: AnyCodec, sample: Sample) -> np.ndarray | None:
    """Where each position draws: the numbers that capture took, since they are the sample's own."""
    if not isinstance(codec, SampledCodec):
        return None
    sample_id = sample["sample_id"].tobytes()
    return uniforms(sample_id, len(sample["input_ids"]), codec.num_draws, seed=DRAW_SEED)


def _reduced(target: AnyCodec, logits_of: LogitsOf, sample: Sample) -> dict[str, np.ndarray]:
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
    return target.encode(reduced) | always  # pyright: ignore[reportArgumentType]


SIZES = ("topk_sizes", "sampled_sizes")
UNUSED_MASS = "unused_mass"


def probed_again(
    target: AnyCodec,
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
        sizes = [
            converted[name].astype(np.int64)[counts]
            for sample, counts in positions
            for converted in [convert(sample)]
            for name in SIZES
            if name in converted
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
