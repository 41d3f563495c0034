"""Converted caches: what is exact is equal bit by bit, what is lost was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from teacher_cache.cache.codecs.dense import LOGITS, DenseCodec
from teacher_cache.cache.codecs.hidden import HIDDEN, HiddenCodec
from teacher_cache.cache.codecs.interface import Codec, Decoded
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.sampled import DistinctCodec, SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.manifest import Manifest, SplitSummary, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Fields, Ragged, language_model_schema
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.cache.verify import verify
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.pipeline.tables import NOT_MEASURED_AGAIN, kept_table
from teacher_cache.stages import convert
from teacher_cache.stages.cache_teacher import CacheTeacherResult, StageOneObserver
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.data.packing import PackedSample, Piece
from teacher_cache.stages.models.head import HEAD_FILE, LanguageModelHead
from tests.command_line import done, refused
from tests.small_caches import contents, make_manifest, make_plans
from tests.small_caches import write_cache as write_classifiers_cache
from tests.tiny_language_models import TinyTeacher, cached, tiny_teacher

NUM_IDS, UNUSED = 60, (3, 58)
GRID = (1.0, 2.0, 4.0)
CODECS: dict[str, Codec] = {
    "dense": DenseCodec(support_size=NUM_IDS),
    "hidden": HiddenCodec(support_size=NUM_IDS, width=8),
    "topk": TopKCodec(support_size=NUM_IDS, top_k=12, temperatures=GRID),
    "exact": TopKCodec(support_size=NUM_IDS, top_k=12, temperatures=GRID, is_exact=True),
    "nucleus": TopKCodec(support_size=NUM_IDS, top_k=30, temperatures=GRID, top_p=0.8),
    "sampled": SampledCodec(support_size=NUM_IDS, num_draws=20, temperatures=GRID),
    "distinct": DistinctCodec(support_size=NUM_IDS, num_ids=9, temperatures=GRID),
}
NUM_SAMPLES = 6  # in two shards


def _sample(number: int) -> PackedSample:
    rng = np.random.default_rng(number)
    lengths = [int(one) for one in rng.integers(1, 12, size=2)]
    return PackedSample(
        input_ids=rng.integers(NUM_IDS, size=sum(lengths)).astype(np.uint32),
        segment=np.repeat(np.arange(2), lengths).astype(np.uint16),
        pieces=tuple(Piece(document_id=b"%d" % number, start=0, stop=length) for length in lengths),
    )


def _write(folder: Path, teacher: TinyTeacher, codec: Codec) -> Path:
    """What stage one would have cached."""
    plans = make_plans(NUM_SAMPLES)
    settings: dict[str, Any] = {"task": "lm", "codec": codec.settings}
    if isinstance(codec, SampledCodec | DistinctCodec):
        settings["draw_seed"] = 0
    manifest = replace(
        make_manifest(plans, settings),
        schema=language_model_schema(codec.fields, is_packed=True),
        about={"probe": {"reconstruction": [{"kl": 1e-7}]}, "name": "tiny"},
        splits={
            "labeled": SplitSummary(
                num_documents=NUM_SAMPLES,
                num_shards=len(plans["labeled"]),
                report={"num_empty": 0, "num_duplicates": 0},
            )
        },
    )

    def teacher_files(to: Path) -> None:
        write_json_atomically(to / "tokenizer.json", {"a": 1})
        if isinstance(codec, HiddenCodec):
            LanguageModelHead.of(teacher.model).of_support(teacher.support).write(to)

    with CacheWriter(folder, manifest, plans, overwrite=False) as to:
        for split, shard_idx in to.begin(teacher_files):
            samples = [_sample(one) for one in range(*plans[split].documents(shard_idx))]
            rows = [cached(teacher, codec, one) for one in samples]
            ids = b"".join(one.sample_id for one in samples)
            fields: Fields = {"sample_id": np.frombuffer(ids, "V16")}
            for spec in manifest.schema[1:]:
                fields[spec.name] = Ragged.from_arrays(
                    [row[spec.name] for row in rows], spec.dtype, spec.inner_shape
                )
            to.commit(split, shard_idx, fields, num_truncated=0, environment={"threads": 1})
        to.finish()
    return folder


@pytest.fixture(scope="module")
def teacher() -> TinyTeacher:
    return tiny_teacher(NUM_IDS, unused=UNUSED)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, teacher: TinyTeacher) -> Callable[[str], Path]:
    """A cache of the codec of that name; only to be read."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("caches") / name
            made[name] = _write(folder, teacher, CODECS[name])
        return made[name]

    return of


def _run(cache: Path, out: Path, **options: Any) -> CacheTeacherResult:
    result = convert.run(ConvertConfig.of(cache=cache, out=out, device="cpu", **options))
    assert verify(out).problems == ()
    return result


def _decoded(
    cache: Path, temperature: float, teacher: TinyTeacher
) -> list[tuple[dict[str, np.ndarray], Decoded]]:
    """Each sample with its distributions, in numpy."""
    reader = CacheReader(cache)
    codec = codec_from(reader.manifest.settings["codec"])
    found = []
    for idx in range(len(reader)):
        sample = reader.sample(idx)
        rows: Any = codec.expand(sample)
        if isinstance(codec, HiddenCodec):
            head = LanguageModelHead.of(teacher.model).of_support(teacher.support)
            codec = replace(codec, head=head)
            rows = {name: torch.from_numpy(np.array(one)) for name, one in rows.items()}
            with torch.inference_mode():
                one = codec.decode(rows, temperature)
            one = replace(
                one, log_probs=one.log_probs.numpy(), tail_log_prob=one.tail_log_prob.numpy()
            )
        else:
            one = codec.decode(rows, temperature)
        found.append((sample, one))
    return found


def _probabilities(decoded: Decoded) -> tuple[np.ndarray, np.ndarray]:
    """[S, V] of the stored ids (0 elsewhere) and [S] of all others."""
    probabilities = np.exp(np.asarray(decoded.log_probs, np.float64))
    tail = np.exp(np.asarray(decoded.tail_log_prob, np.float64))
    if decoded.ids is None:
        return probabilities, tail
    spread = np.zeros((len(probabilities), NUM_IDS))
    ids = np.asarray(decoded.ids)
    rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    spread[rows[ids >= 0], ids[ids >= 0]] = probabilities[ids >= 0]
    return spread, tail


@pytest.mark.parametrize("name", CODECS)
def test_another_format_holds_the_same_fields(
    tmp_path: Path, source: Callable[[str], Path], name: str
) -> None:
    cache = source(name)
    _run(cache, tmp_path / "zarr", format="zarr")
    _run(tmp_path / "zarr", tmp_path / "arrow", format="arrow")
    old, new = CacheReader(cache), CacheReader(tmp_path / "zarr")
    assert (old.manifest.store, new.manifest.store) == ("arrow", "zarr")
    assert new.manifest.fingerprint == old.manifest.fingerprint
    assert new.manifest.schema == old.manifest.schema
    for idx in range(len(old)):
        before, after = old.sample(idx), new.sample(idx)
        for spec in old.manifest.schema:
            assert after[spec.name].dtype == before[spec.name].dtype
            assert after[spec.name].tobytes() == before[spec.name].tobytes(), spec.name
    first, again = contents(cache), contents(tmp_path / "arrow")
    assert {k: v for k, v in again.items() if "manifest" not in k} == {
        k: v for k, v in first.items() if "manifest" not in k
    }
    origin = new.manifest.about["converted_from"]
    assert origin["cache"] == str(cache.resolve()) and origin["format"] == "arrow"
    assert new.manifest.about["probe"] == old.manifest.about["probe"]


def test_a_classifiers_cache_changes_format_and_nothing_else(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_classifiers_cache(cache, 10, 6, settings={"task": "classification"})
    result = _run(cache, tmp_path / "zarr", format="zarr")
    assert (result.num_shards_run, result.num_shards_kept) == (5, 0)
    for split in ("labeled", "unlabeled"):
        old, new = CacheReader(cache, split), CacheReader(tmp_path / "zarr", split)
        assert list(old.sample_ids()) == list(new.sample_ids())
        assert old.column("class_logits").tobytes() == new.column("class_logits").tobytes()
        assert new.manifest.splits[split].num_truncated == old.manifest.splits[split].num_truncated
    with pytest.raises(UserError, match=r"--codec is of language models, and .* a classifier's"):
        _run(cache, tmp_path / "topk", codec="topk")
    with pytest.raises(UserError, match="is in this format and codec already"):
        _run(cache, tmp_path / "same")


@pytest.mark.parametrize("name", ["dense", "hidden"])
def test_logits_become_heads_as_at_capture(
    tmp_path: Path, source: Callable[[str], Path], teacher: TinyTeacher, name: str
) -> None:
    options = {"codec": "topk", "top_k": 12, "temperatures": "1,2,4"}
    _run(source(name), tmp_path / "topk", **options)
    assert codec_from(read_manifest(tmp_path / "topk").settings["codec"]) == CODECS["topk"]
    assert CacheReader(tmp_path / "topk").manifest.schema == read_manifest(source("topk")).schema
    for temperature in GRID:
        found = _decoded(tmp_path / "topk", temperature, teacher)
        wanted = _decoded(source("topk"), temperature, teacher)
        for (sample, one), (captured, other) in zip(found, wanted, strict=True):
            for ours, theirs in zip(_probabilities(one), _probabilities(other), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=4e-3)  # logits in float16
            for always in ("top1_log_prob", "next_log_prob", "input_ids", "loss_mask"):
                assert sample[always].tobytes() == captured[always].tobytes()


def test_logits_become_the_draws_of_a_capture(
    tmp_path: Path, source: Callable[[str], Path]
) -> None:
    options = {"codec": "sampled", "num_draws": 20, "temperatures": "1,2,4"}
    _run(source("dense"), tmp_path / "sampled", **options)
    manifest = read_manifest(tmp_path / "sampled")
    assert manifest.settings["draw_seed"] == 0
    found, wanted = CacheReader(tmp_path / "sampled"), CacheReader(source("sampled"))
    same = total = 0
    for idx in range(len(found)):
        ours, theirs = (CODECS["sampled"].expand(reader.sample(idx)) for reader in (found, wanted))
        for position in range(len(ours["sampled_sizes"])):
            counts = np.zeros((2, NUM_IDS), int)
            for row, one in enumerate((ours, theirs)):
                size = one["sampled_sizes"][position]
                counts[row, one["sampled_ids"][position, :size]] = one["sampled_counts"][
                    position, :size
                ]
            assert counts.sum(axis=1).tolist() == [20, 20]
            same += int(np.minimum(*counts).sum())
            total += 20
    assert same / total > 0.98  # all but what the rounding of logits moves across a border
    again = tmp_path / "again"
    _run(source("dense"), again, **options)
    assert (
        contents(again)["labeled/000/000000.arrow"]
        == (tmp_path / "sampled/labeled/000/000000.arrow").read_bytes()
    )


def test_states_become_logits_and_the_head_is_left_behind(
    tmp_path: Path, source: Callable[[str], Path], teacher: TinyTeacher
) -> None:
    _run(source("hidden"), tmp_path / "dense", codec="dense")
    manifest = read_manifest(tmp_path / "dense")
    assert HEAD_FILE in read_manifest(source("hidden")).teacher_files
    assert set(manifest.teacher_files) == {"tokenizer.json"}
    assert HIDDEN not in CacheReader(tmp_path / "dense").sample(0)
    for (sample, one), (_, other) in zip(
        _decoded(tmp_path / "dense", 2.0, teacher),
        _decoded(source("hidden"), 2.0, teacher),
        strict=True,
    ):
        np.testing.assert_allclose(_probabilities(one)[0], _probabilities(other)[0], atol=1e-3)
        assert np.isneginf(sample[LOGITS][:, UNUSED]).all()


@pytest.mark.parametrize(
    ("name", "options", "num_kept"),
    [
        ("topk", {"top_k": 5}, 5),
        ("topk", {"temperatures": "2,4"}, 12),
        ("topk", {"top_k": 5, "temperatures": "2"}, 5),
        ("exact", {"top_k": 5}, 5),
        ("exact", {"exact": False}, 12),
        ("exact", {"exact": False, "top_k": 3, "temperatures": "1,4"}, 3),
        ("topk", {"top_p": 0.5}, None),
        ("nucleus", {"top_p": 0.5}, None),
        ("nucleus", {"top_k": 4}, None),
        ("exact", {"top_p": 0.6, "exact": False}, None),
    ],
)
def test_a_head_is_cut_and_what_stays_keeps_its_probability(
    tmp_path: Path,
    source: Callable[[str], Path],
    teacher: TinyTeacher,
    name: str,
    options: dict[str, Any],
    num_kept: int | None,
) -> None:
    _run(source(name), tmp_path / "cut", **options)
    codec: Any = codec_from(read_manifest(tmp_path / "cut").settings["codec"])
    for temperature in codec.temperatures:
        found = _decoded(tmp_path / "cut", temperature, teacher)
        wanted = _decoded(source(name), temperature, teacher)
        for (_, one), (_, other) in zip(found, wanted, strict=True):
            ours, tail = _probabilities(one)
            theirs, _ = _probabilities(other)
            kept = ours > 0
            np.testing.assert_allclose(ours[kept], theirs[kept], atol=2e-3)
            np.testing.assert_allclose(ours.sum(axis=1) + tail, 1, atol=1e-5)
            ids, before = np.asarray(one.ids), np.asarray(other.ids)
            if num_kept is not None:
                assert (ids == before[:, :num_kept]).all()
            for row in range(len(ids)):
                size = int((ids[row] >= 0).sum())
                assert ids[row, :size].tolist() == before[row, :size].tolist()
                if codec.top_p is not None and temperature == 1 and size < codec.top_k:
                    mass = np.cumsum(np.sort(theirs[row])[::-1])[: size + 1]
                    assert mass[size - 1] > codec.top_p - 2e-3 or size == (before[row] >= 0).sum()
                    assert size == 1 or mass[size - 2] < codec.top_p + 2e-3


@pytest.mark.parametrize("name", ["dense", "hidden"])
def test_distinct_ids_of_whole_distributions_are_those_of_capture(
    name: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """From the same numbers; of states nearly the same probabilities, so nearly the same ids."""
    _run(source(name), tmp_path / "out", codec="sampled", num_ids=9, temperatures="1,2,4")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.settings["codec"] == CODECS["distinct"].settings
    assert manifest.settings["draw_seed"] == 0
    found, wanted = CacheReader(tmp_path / "out"), CacheReader(source("distinct"))
    same = num = 0
    for idx in range(len(found)):
        ours, theirs = found.sample(idx)["sampled_ids"], wanted.sample(idx)["sampled_ids"]
        same += sum(len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True))
        num += ours.size
    assert same > 0.98 * num


def test_fewer_temperatures_of_distinct_ids(source: Callable[[str], Path], tmp_path: Path) -> None:
    _run(source("distinct"), tmp_path / "out", temperatures="1,4")
    old, new = CacheReader(source("distinct")), CacheReader(tmp_path / "out")
    for idx in range(len(new)):
        before, after = old.sample(idx), new.sample(idx)
        assert after["sampled_tail_r"].tobytes() == before["sampled_tail_r"][:, [0, 2]].tobytes()
        for one in ("sampled_ids", "sampled_values", "sampled_range", "sampled_heads"):
            assert after[one].tobytes() == before[one].tobytes()


def test_draws_lose_temperatures_and_nothing_else(
    tmp_path: Path, source: Callable[[str], Path]
) -> None:
    _run(source("sampled"), tmp_path / "fewer", temperatures="1,4")
    old, new = CacheReader(source("sampled")), CacheReader(tmp_path / "fewer")
    for idx in range(len(old)):
        before, after = old.sample(idx), new.sample(idx)
        assert after["sampled_lse"].tobytes() == before["sampled_lse"][:, [0, 2]].tobytes()
        for name in ("sampled_ids", "sampled_counts", "sampled_log_probs", "sampled_sizes"):
            assert after[name].tobytes() == before[name].tobytes()
    probe = new.manifest.about["probe"]
    sizes = np.concatenate([
        new.sample(i)["sampled_sizes"][new.sample(i)["loss_mask"]] for i in range(len(new))
    ])  # fmt: skip
    assert probe["reconstruction"] == [] and probe["num_ids"] == pytest.approx(sizes[:128].mean())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("topk", {"codec": "dense"}, "of all others only their mass; run pipe cache-teacher"),
        ("topk", {"codec": "sampled"}, "it holds the most probable ids"),
        ("topk", {"codec": "hidden"}, "it holds the most probable ids"),
        ("topk", {"top_k": 13}, "it holds 12 ids a position, fewer than --top-k 13"),
        ("topk", {"exact": True}, "rounded to a byte each"),
        ("topk", {"temperatures": "1,3"}, r"temperature 3 is not one of its grid \(1, 2, 4\)"),
        ("nucleus", {"top_p": 0.9}, "its heads end at the mass 0.8"),
        ("sampled", {"codec": "topk"}, "it holds the ids that were drawn"),
        ("sampled", {"num_draws": 10}, "the teacher is not there to draw again"),
        ("sampled", {"num_ids": 10}, "it holds the ids that were drawn"),
        ("distinct", {"num_draws": 10}, "it holds the ids that were drawn"),
        ("distinct", {"num_ids": 8}, "the teacher is not there to draw again"),
        ("distinct", {"temperatures": "1,3"}, "temperature 3 is not one of its grid"),
        ("sampled", {"temperatures": "1,3"}, "temperature 3 is not one of its grid"),
        ("dense", {"codec": "hidden"}, "it holds logits, not the states"),
        ("dense", {"codec": "topk", "num_draws": 3}, "--num-draws is of --codec sampled"),
        ("dense", {"codec": "topk"}, "--top-k 64 cannot be: the teacher uses 60 ids"),
        ("hidden", {}, "is in this format and codec already: give another --format or"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(
    tmp_path: Path, source: Callable[[str], Path], name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        _run(source(name), tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def _shown(manifest: Manifest) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(kept_table(manifest))
    return console.export_text()


def test_the_manifest_says_what_was_measured_against_what(
    tmp_path: Path, source: Callable[[str], Path]
) -> None:
    _run(source("dense"), tmp_path / "topk", codec="topk", top_k=8, temperatures="1,2")
    manifest = read_manifest(tmp_path / "topk")
    origin = manifest.about["converted_from"]
    assert origin["codec"] == CODECS["dense"].settings
    assert origin["probe"] == {"reconstruction": [{"kl": 1e-7}]}
    assert manifest.settings["converted_from"]["codec"] == CODECS["dense"].settings
    assert manifest.fingerprint != read_manifest(source("dense")).fingerprint
    probe = manifest.about["probe"]
    assert probe["measured_against"] == "dense"
    assert [error["temperature"] for error in probe["reconstruction"]] == [1.0, 2.0]
    assert all(0 <= error["kl"] < 1e-3 for error in probe["reconstruction"])
    sidecar = CacheReader(tmp_path / "topk").sidecars[0]
    assert sidecar.environment["converted"]["torch"] and sidecar.environment["threads"] == 1
    # Stage one with those options would cache other values: it must not go on with these.
    assert manifest.settings != read_manifest(source("topk")).settings

    assert "reconstruction KL, from dense at temperature 1" in _shown(manifest)
    _run(tmp_path / "topk", tmp_path / "cut", top_k=4)
    assert NOT_MEASURED_AGAIN in _shown(read_manifest(tmp_path / "cut"))
    nested = read_manifest(tmp_path / "cut").settings["converted_from"]
    assert nested["converted_from"]["codec"] == CODECS["dense"].settings


class Interruption(Exception):
    """Stands for a kill."""


class StopsAfter(StageOneObserver):
    """Interrupts once a shard is durable."""

    def on_shard(self, sidecar: Sidecar) -> None:
        raise Interruption


def test_goes_on_where_it_stopped(tmp_path: Path, source: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"codec": "topk", "top_k": 8, "format": "zarr"}
    _run(source("dense"), tmp_path / "whole", **options)
    config = ConvertConfig.of(cache=source("dense"), out=tmp_path / "out", device="cpu", **options)
    with pytest.raises(Interruption):
        convert.run(config, StopsAfter())
    assert not read_manifest(tmp_path / "out").complete
    result = convert.run(config)
    assert (result.num_shards_run, result.num_shards_kept) == (1, 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    path = tmp_path / "out/labeled/000/000001.zarr/topk_ids/c/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert verify(tmp_path / "out").problems
    assert convert.run(config).num_shards_run == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match=r"settings\.codec\.top_k is 8 there and 7 in this command"):
        convert.run(config.model_copy(update={"top_k": 7}))
    with pytest.raises(UserError, match="format is 'zarr' there and 'arrow' in this command"):
        convert.run(config.model_copy(update={"format": "arrow"}))


def test_a_damaged_source_is_named_and_nothing_is_made_of_it(
    tmp_path: Path, teacher: TinyTeacher
) -> None:
    cache = _write(tmp_path / "cache", teacher, CODECS["dense"])
    path = cache / "labeled/000/000001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadShardError, match=r"000001\.arrow: record batch 0 .* its checksum"):
        _run(cache, tmp_path / "out", format="zarr")
    assert not read_manifest(tmp_path / "out").complete


@pytest.mark.parametrize("inside", [".", "labeled/new"])
def test_a_cache_is_not_converted_into_itself(
    tmp_path: Path, source: Callable[[str], Path], inside: str
) -> None:
    with pytest.raises(UserError, match="is the cache that is converted, or lies in it"):
        _run(source("topk"), source("topk") / inside, format="zarr", overwrite=True)
    assert read_manifest(source("topk")).complete


def test_by_hand(tmp_path: Path, source: Callable[[str], Path]) -> None:
    out = tmp_path / "zarr"
    printed = done("convert", source("topk"), out, "--format", "zarr", "--top-k", "4")
    assert "2 shards written, 0 kept" in printed and "zarr" in printed
    assert "0 shards written, 2 kept" in done(
        "convert", source("topk"), out, "--format", "zarr", "--top-k", "4"
    )
    refused("convert", source("topk"), out, "--format", "zarr", saying="top_k is 4 there and 12")
    refused("convert", source("topk"), tmp_path / "no", "--codec", "dense", saying="cannot become")
