"""`pipe convert`: the same samples in another format or codec, without a teacher.

From all logits (`dense`, and `hidden` through its head) a distribution is reduced as at capture.
What holds a part of it can be cut to less of the same, as its room does it. Nothing is made up:
what a codec needs and the cache does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS, Codec, has_rows
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import Manifest, read_teacher_file, utc_now
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import COUNTED, Fields, Ragged, Schema, counted_fields
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.cache_job import versioned
from teacher_cache.stages.cache_teacher import CacheTeacherResult, StageOneObserver
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.config import CodecConfig, ConvertConfig
from teacher_cache.stages.codecs.interface import Sample
from teacher_cache.stages.codecs.measure import (
    NUM_POSITIONS,
    measured_temperatures,
    reconstruction_error,
)
from teacher_cache.stages.codecs.named import (
    codec_of,
    given_attributes,
    open_codec,
    room_named,
    room_of,
)
from teacher_cache.stages.config import DeviceConfig, flag_of, given_options, refuse_foreign_options
from teacher_cache.stages.models.device import environment, resolve_device
from teacher_cache.stages.models.head import HEAD_FILE
from teacher_cache.stages.tokens.support import Support


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """What a conversion does to the codec's fields of a sample.

    Attributes:
        source: of the cache that is read.
        target: of the one that is written.
        logits_of: where the source keeps all logits.
        device: where they are reduced.
    """

    source: Codec
    target: Codec
    logits_of: LogitsOf | None
    device: torch.device

    @property
    def recode(self) -> Recode:
        """From a sample's fields to the target's."""
        return recode(self.source, self.target, self.logits_of)

    def environment(self) -> dict[str, Any]:
        """What the bits of a new shard depend on besides those of the old one."""
        return {**environment(self.device), "torch": version("torch")}


def run(config: ConvertConfig, observer: StageOneObserver | None = None) -> CacheTeacherResult:
    """Write a complete cache again as another; resumes from the committed shards.

    Raises:
        UserError: if the caches are one, there is nothing to convert, or the old cache does not
            hold what the new one needs.
        CheckFailed: if the old cache is damaged.
    """
    observer = observer or StageOneObserver()
    _refuse_own_folder(config)
    whole = CacheReader(config.cache)
    source = whole.manifest
    readers = {split: CacheReader(config.cache, split) for split in source.splits}
    codecs = _codecs(config, whole)
    if codecs is None and (config.format or source.store) == source.store:
        raise UserError(
            f"{config.cache} is in this format and codec already: give another --format or "
            "--codec, or copy the folder"
        )
    manifest = _manifest(config, source, codecs, readers)
    plans = {
        split: ShardPlan(
            num_documents=summary.num_documents,
            documents_per_shard=source.layout["documents_per_shard"],
        )
        for split, summary in source.splits.items()
    }
    files = [
        name
        for name in source.teacher_files
        if name != HEAD_FILE or codecs is None or room_of(codecs.target).keeps_states
    ]
    with CacheWriter(
        config.out, manifest, plans, overwrite=config.overwrite, needed_files=files
    ) as writer:
        todo = writer.begin(lambda folder: _copy_teacher_files(config.cache, source, files, folder))
        kept = writer.committed()
        observer.on_plan(config.out, plans, kept, todo)
        for split, shard_idx in todo:
            reader = readers[split]
            old = reader.sidecars[shard_idx]
            fields = reader.shard(shard_idx)
            observer.on_batch(old.num_samples, old.num_tokens)
            found_in = old.environment
            if codecs is not None:
                fields = _recoded(source.schema, manifest.schema, codecs, fields)
                found_in = found_in | {"converted": codecs.environment()}
            sidecar = writer.commit(
                split, shard_idx, fields, num_truncated=old.num_truncated, environment=found_in
            )
            observer.on_shard(sidecar)
        if not writer.manifest.complete:
            writer.finish()
        return CacheTeacherResult(
            cache=config.out,
            manifest=writer.manifest,
            num_shards_run=len(todo),
            num_shards_kept=len(kept),
        )


def _refuse_own_folder(config: ConvertConfig) -> None:
    cache, out = config.cache.resolve(), config.out.resolve()
    if cache == out or cache in out.parents:
        raise UserError(
            f"{config.out} is the cache that is converted, or lies in it: give a folder of its own"
        )


def _codecs(config: ConvertConfig, reader: CacheReader) -> Codecs | None:
    """The codecs of the conversion; None where the fields stay as they are.

    Raises:
        UserError: if the source has no such codecs, or does not hold what the target needs.
    """
    recorded = reader.manifest.settings.get("codec")
    if not isinstance(recorded, dict):  # of class logits, which are stored as they are
        given = given_options(config)
        if given:
            raise UserError(
                f"{flag_of(given[0])} is of language models, and {config.cache} is a "
                "classifier's, whose logits are exact: leave it out"
            )
        return None
    ours = codec_from(recorded)
    target = target_codec(config.kept, ours)
    if ours == target:
        return None
    device = resolve_device(DeviceConfig(device=config.device))
    logits_of = LogitsOf.of(reader, device)
    return Codecs(source=ours, target=target, logits_of=logits_of, device=device)


def _manifest(
    config: ConvertConfig,
    source: Manifest,
    codecs: Codecs | None,
    readers: Mapping[str, CacheReader],
) -> Manifest:
    """The old cache's but for format and codec, and where it comes from."""
    store = config.format or source.store
    settings, schema, about = source.settings, source.schema, dict(source.about)
    origin = {
        "cache": str(config.cache.resolve()),
        "format": source.store,
        "fingerprint": source.fingerprint,
        "completed_at": source.completed_at,
    }
    if codecs is not None:
        settings = _settings(settings, codecs)
        schema = _schema(schema, codecs)
        origin |= {"codec": codecs.source.settings, "probe": about.pop("probe", None)}
        about["probe"] = measured_again(codecs.target, codecs.recode, codecs.logits_of, readers)
        if not room_of(codecs.target).keeps_states:
            about.pop("language_model_head", None)
    return replace(
        source,
        fingerprint=fingerprint(settings),
        settings=settings,
        schema=schema,
        splits={
            split: replace(summary, num_samples=0, num_tokens=0, num_truncated=0, num_bytes=0)
            for split, summary in source.splits.items()
        },
        about=about | {"converted_from": origin},
        teacher_files={},
        versions=source.versions | {name: version(name) for name in versioned(store)},
        store=store,
        index=(),
        complete=False,
        created_at=utc_now(),
        completed_at=None,
    )


def _settings(source: Mapping[str, Any], codecs: Codecs) -> dict[str, Any]:
    """Those of a cache whose values come through the source's codec, not from the teacher."""
    before = {"codec": source["codec"], "converted_from": source.get("converted_from")}
    own = room_of(codecs.source).settings(codecs.source)
    settings = {name: one for name, one in source.items() if name not in own}
    again = room_of(codecs.target).settings(codecs.target)
    return {**settings, "codec": codecs.target.settings, "converted_from": before, **again}


def _schema(source: Schema, codecs: Codecs) -> Schema:
    """The target's fields where the source's stood; all others as they are."""
    ours = {spec.name for spec in codecs.source.fields}
    first = next(idx for idx, spec in enumerate(source) if spec.name in ours)
    rest = tuple(spec for spec in source[first:] if spec.name not in ours)
    own = codecs.target.fields
    if any(COUNTED in spec.shape for spec in source):
        own = counted_fields(own)
    return (*source[:first], *own, *rest)


def _recoded(source: Schema, target: Schema, codecs: Codecs, fields: Fields) -> Fields:
    """A shard's fields with those of the codec made anew, sample by sample."""
    convert = codecs.recode
    kept = {spec.name for spec in source} - {spec.name for spec in codecs.source.fields}
    rows = [
        convert({spec.name: fields[spec.name][idx] for spec in source})
        for idx in range(len(fields["sample_id"]))
    ]
    return {
        spec.name: fields[spec.name]
        if spec.name in kept
        else Ragged.from_arrays([row[spec.name] for row in rows], spec.dtype, spec.inner_shape)
        for spec in target
    }


def _copy_teacher_files(cache: Path, source: Manifest, names: list[str], folder: Path) -> None:
    """Copy them with their SHA-256 checked.

    Raises:
        CheckFailed: if one is damaged or missing.
    """
    for name in names:
        write_bytes_atomically(folder / name, read_teacher_file(cache, source, name))


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
    given = given_attributes(config, name)
    if given.keys() - source.settings.keys():  # of another version of the codec
        _require(source, name, room.lacks)
    target = codec_from(source.settings | given)
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
        """[N, V] float32 of its positions that have a distribution, before temperature.

        Up to a constant a position.
        """
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
    """Where each position that has a distribution draws: by the numbers that capture took.

    They are the sample's own.
    """
    sample_id = sample["sample_id"].tobytes()
    drawn = room_of(codec).draws(codec, sample_id, len(sample["input_ids"]))
    return None if drawn is None else drawn[has_rows(sample)]


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


def measured_again(
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
        for temperature in measured_temperatures(target)
    ]
    # Of rows that no token has, nothing is left in the source to measure.
    for error in errors:
        del error[UNUSED_MASS]
    return {"reconstruction": errors, "measured_against": logits_of.codec.name}


def _first_positions(readers: Mapping[str, CacheReader]) -> list[tuple[Sample, np.ndarray]]:
    """The first samples and, bool, those of their positions with a distribution that count.

    128 in all.
    """
    found: list[tuple[Sample, np.ndarray]] = []
    left = NUM_POSITIONS
    for sample in islice(_samples(readers), NUM_POSITIONS):
        counts = sample["loss_mask"] & (np.cumsum(sample["loss_mask"]) <= left)
        if counts.any():
            found.append((sample, counts[has_rows(sample)]))
            left -= int(counts.sum())
        if not left:
            break
    return found


def _samples(readers: Mapping[str, CacheReader]) -> Iterator[Sample]:
    for reader in readers.values():
        for idx in range(len(reader)):
            yield reader.sample(idx)
