from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache import commit
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.sidecar import SHARDS_PER_FOLDER, read_sidecar
from teacher_cache.cache.stores.named import DEFAULT_STORE
from teacher_cache.cache.verify import verify
from teacher_cache.cache.writer import CacheWriter
from tests.small_caches import (
    SETTINGS,
    commit_shard,
    contents,
    make_manifest,
    make_plans,
    set_shards_per_folder,
    shard_file,
    write_cache,
    write_teacher_files,
)

pytestmark = pytest.mark.usefixtures("store")

ALL = [("labeled", 0), ("labeled", 1), ("labeled", 2), ("unlabeled", 0), ("unlabeled", 1)]


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at(wanted_split: str, wanted_idx: int) -> Callable[[str, int], None]:
    def stop(split: str, shard_idx: int) -> None:
        if (split, shard_idx) == (wanted_split, wanted_idx):
            raise Stop

    return stop


def flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A complete cache of 10 labelled and 6 unlabelled documents: 3 and 2 shards."""
    write_cache(tmp_path / "cache", 10, 6)
    return tmp_path / "cache"


def test_a_fresh_cache_computes_every_shard_in_order(tmp_path: Path, store: str) -> None:
    cache = tmp_path / "cache"
    assert write_cache(cache, 10, 6) == ALL
    found = {re.sub(r"(\.zarr)/.*", r"\1", name) for name in contents(cache)}
    assert sorted(found) == [
        "index/labeled-000000.arrow",
        "index/unlabeled-000000.arrow",
        *(f"labeled/000/00000{idx}.{end}" for idx in range(3) for end in sorted((store, "json"))),
        "manifest.json",
        "teacher/config.json",
        "teacher/tokenizer.json",
        *(f"unlabeled/000/00000{idx}.{end}" for idx in range(2) for end in sorted((store, "json"))),
    ]
    summary = read_manifest(cache).splits["labeled"]
    assert (summary.num_documents, summary.num_samples, summary.num_shards) == (10, 9, 3)
    assert summary.num_truncated == 3
    files = [path for path in (cache / "labeled").rglob("*") if path.is_file()]
    shards = [path for path in files if path.parent.name != "000" or path.suffix != ".json"]
    assert summary.num_bytes == sum(path.stat().st_size for path in shards)
    assert verify(cache).problems == ()


def test_a_complete_cache_is_left_as_it_is(cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    manifest = (cache / MANIFEST_NAME).read_bytes()
    assert write_cache(cache, 10, 6) == []
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before
    assert (cache / MANIFEST_NAME).read_bytes() == manifest


@pytest.mark.parametrize("at", ALL)
def test_goes_on_where_it_stopped(tmp_path: Path, cache: Path, at: tuple[str, int]) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(Stop):
        write_cache(stopped, 10, 6, before_shard=stop_at(*at))
    assert not read_manifest(stopped).complete
    created_at = read_manifest(stopped).created_at
    assert write_cache(stopped, 10, 6) == ALL[ALL.index(at) :]
    assert contents(stopped) == contents(cache)
    assert read_manifest(stopped).created_at == created_at


def test_leftovers_of_a_killed_run_are_removed(cache: Path) -> None:
    before = contents(cache).keys()
    for name in (".manifest.json.tmp", "labeled/000/.000001.arrow.tmp", "index/.a.arrow.tmp"):
        (cache / name).write_bytes(b"half")
    for name in (".000001.zarr.tmp", ".000001.zarr.retired.tmp"):
        (cache / "labeled/000" / name / "label/c").mkdir(parents=True)
        (cache / "labeled/000" / name / "label/c/0").write_bytes(b"half")
    write_cache(cache, 10, 6)
    assert contents(cache).keys() == before
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("was_complete", [True, False])
def test_other_settings_are_refused_with_field_values_and_remedy(
    tmp_path: Path, cache: Path, was_complete: bool
) -> None:
    if not was_complete:
        shutil.rmtree(cache)
        with pytest.raises(Stop):
            write_cache(cache, 10, 6, before_shard=stop_at("labeled", 1))
    before = contents(cache)
    changed = {**SETTINGS, "teacher": {"dtype": "float16", "weights_sha256": "0a"}}
    with pytest.raises(UserError) as caught:
        write_cache(cache, 10, 6, settings=changed)
    assert str(caught.value) == (
        f"{cache} was made with other settings: settings.teacher.dtype is 'float32' there and "
        "'float16' in this command. Give the recorded values, another --out, or --overwrite to "
        "start again"
    )
    assert contents(cache) == before


def test_another_layout_is_refused(cache: Path) -> None:
    plans = make_plans(10, 6)
    manifest = make_manifest(plans)
    manifest.layout["shard_mb"] = 1
    wanted = r"layout.shard_mb is 64 there and 1 in this command.*--overwrite"
    with (
        pytest.raises(UserError, match=wanted),
        CacheWriter(cache, manifest, plans, overwrite=False),
    ):
        pass


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((9, 6), "10 labeled documents, this run asks for 9"),
        ((10, 5), "6 unlabeled documents, this run asks for 5"),
        ((10, 0), "6 unlabeled documents, this run asks for 0"),
    ],
)
def test_fewer_documents_are_refused(cache: Path, sizes: tuple[int, int], words: str) -> None:
    before = contents(cache)
    with pytest.raises(UserError, match=f"was started for {words}: raise the limit") as caught:
        write_cache(cache, *sizes)
    assert "another --out for the smaller cache, or --overwrite" in str(caught.value)
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("more", "computed"),
    [
        ((11, 6), [("labeled", 2)]),
        ((12, 6), [("labeled", 2)]),
        ((13, 6), [("labeled", 2), ("labeled", 3)]),
        ((10, 9), [("unlabeled", 1), ("unlabeled", 2)]),
        ((12, 8), [("labeled", 2), ("unlabeled", 1)]),
    ],
)
def test_more_documents_run_the_partial_shard_again_and_no_other(
    tmp_path: Path, cache: Path, more: tuple[int, int], computed: list[tuple[str, int]]
) -> None:
    assert write_cache(cache, *more) == computed
    write_cache(tmp_path / "fresh", *more)
    assert contents(cache) == contents(tmp_path / "fresh")


def test_more_documents_after_a_whole_last_shard(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", 8)
    assert write_cache(tmp_path / "cache", 9) == [("labeled", 2)]
    write_cache(tmp_path / "fresh", 9)
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")


def test_a_growing_cache_is_not_complete_until_it_is(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(Stop):
        write_cache(cache, 14, 6, before_shard=stop_at("labeled", 3))
    with pytest.raises(UserError, match="is not complete"):
        CacheReader(cache)
    with pytest.raises(UserError, match="was started for 14 labeled documents"):
        write_cache(cache, 10, 6)
    assert write_cache(cache, 14, 6) == [("labeled", 3)]
    write_cache(tmp_path / "fresh", 14, 6)
    assert contents(cache) == contents(tmp_path / "fresh")


def test_overwrite_starts_again_whatever_was_there(tmp_path: Path, cache: Path) -> None:
    changed = {**SETTINGS, "max_length": 4}
    assert write_cache(cache, 5, settings=changed, overwrite=True) == ALL[:2]
    write_cache(tmp_path / "fresh", 5, settings=changed)
    assert contents(cache) == contents(tmp_path / "fresh")
    assert write_cache(tmp_path / "new", 5, overwrite=True) == ALL[:2]


@pytest.mark.parametrize("text", ["{", '{"format": "teacher-cache", "format_version": 99}'])
def test_overwrite_replaces_what_cannot_be_read(cache: Path, text: str) -> None:
    before = contents(cache)
    (cache / MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError):
        write_cache(cache, 10, 6)
    assert write_cache(cache, 10, 6, overwrite=True) == ALL
    assert contents(cache) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "teacher/model.safetensors", "labeled/a.txt"])
def test_a_folder_that_is_no_cache_is_left_alone(
    tmp_path: Path, name: str, overwrite: bool
) -> None:
    kept = [tmp_path / name, tmp_path / "sub" / ".draft.tmp"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("dear")
    with pytest.raises(UserError) as caught:
        write_cache(tmp_path, overwrite=overwrite)
    first = min(name.split("/")[0], "sub")
    assert f"holds {first!r} and no manifest.json, so it is no cache" in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_programs_manifest_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"name": "a web page"}')
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "page.html").write_text("dear")
    (tmp_path / ".draft.tmp").write_text("dear")
    with pytest.raises(UserError, match="is no cache's manifest"):
        write_cache(tmp_path, overwrite=overwrite)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {MANIFEST_NAME, "page.html", ".draft.tmp"}


def test_a_run_killed_before_its_first_manifest_leaves_a_folder_to_go_on_in(
    tmp_path: Path, cache: Path
) -> None:
    started = tmp_path / "started"
    started.mkdir()
    (started / ".manifest.json.tmp").write_bytes(b"{")
    (started / "writer.lock").write_text("{}")
    assert write_cache(started, 10, 6) == ALL
    assert contents(started) == contents(cache)


SHARD = ("labeled", 1)
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[tuple[str, int]]]] = {
    "shard flipped": (lambda cache: flip(shard_file(cache, *SHARD)), [SHARD]),
    "shard truncated": (lambda cache: os.truncate(shard_file(cache, *SHARD), 9), [SHARD]),
    "shard missing": (lambda cache: shard_file(cache, *SHARD).unlink(), [SHARD]),
    "sidecar missing": (lambda cache: (cache / "labeled/000/000001.json").unlink(), [SHARD]),
    "sidecar no JSON": (lambda cache: flip(cache / "labeled/000/000001.json", 0), [SHARD]),
    "sidecar altered": (
        lambda cache: _edit_sidecar(cache / "labeled/000/000001.json", num_truncated=0),
        [SHARD],
    ),
    "segment flipped": (lambda cache: flip(cache / "index/labeled-000000.arrow"), []),
    "segment missing": (lambda cache: (cache / "index/unlabeled-000000.arrow").unlink(), []),
    "teacher file flipped": (lambda cache: flip(cache / "teacher/tokenizer.json"), []),
    "teacher file missing": (lambda cache: (cache / "teacher/config.json").unlink(), []),
    "two shards": (
        lambda cache: [flip(shard_file(cache, one, 0)) for one in ("labeled", "unlabeled")],
        [("labeled", 0), ("unlabeled", 0)],
    ),
}


def _edit_sidecar(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_rebuilt_and_nothing_else(
    cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(cache)
    inflict, rebuilt = DAMAGES[damage]
    inflict(cache)
    assert verify(cache).problems
    with caplog.at_level(logging.WARNING, "teacher_cache"):
        assert write_cache(cache, 10, 6) == rebuilt
    assert len(caplog.records) >= (damage != "sidecar missing")
    assert contents(cache) == whole
    assert verify(cache).problems == ()


def test_a_complete_cache_that_lacks_a_needed_file_gets_it_and_keeps_its_shards(
    cache: Path,
) -> None:
    before, plans, told = contents(cache), make_plans(10, 6), []

    def write_more(folder: Path) -> None:
        told.append(folder)
        write_teacher_files(folder)
        (folder / "table").write_bytes(b"1")

    def write_again(needed_files: list[str]) -> None:
        manifest = make_manifest(plans)
        with CacheWriter(cache, manifest, plans, overwrite=False, needed_files=needed_files) as to:
            assert to.begin(write_more) == []
            if not to.manifest.complete:
                to.finish()

    write_again(["config.json"])
    assert not told and contents(cache) == before
    write_again(["config.json", "table"])
    assert len(told) == 1 and (cache / "teacher" / "table").read_bytes() == b"1"
    after = contents(cache)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {MANIFEST_NAME, "teacher/table"}
    assert verify(cache).problems == ()
    write_again(["config.json", "table"])
    assert len(told) == 1 and contents(cache) == after


def test_a_run_that_stops_at_its_teacher_files_forgets_none_that_is_intact(cache: Path) -> None:
    shard_file(cache, "labeled", 0).unlink()
    flip(cache / "teacher" / sorted(path.name for path in (cache / "teacher").iterdir())[0])
    intact: list[frozenset[str]] = []

    def stop(_: Path) -> None:
        raise Stop

    for _ in range(2):
        plans = make_plans(10, 6)
        with CacheWriter(cache, make_manifest(plans), plans, overwrite=False) as writer:
            intact.append(writer.intact_files)
            with pytest.raises(Stop):
                writer.begin(stop)
    assert intact[0] == intact[1]
    assert len(intact[0]) == len(list((cache / "teacher").iterdir())) - 1


def test_a_rebuilding_run_that_stops_forgets_no_damage(cache: Path) -> None:
    whole = contents(cache)
    flip(shard_file(cache, "labeled", 0))
    _edit_sidecar(cache / "labeled/000/000002.json", num_truncated=0)
    flip(shard_file(cache, "unlabeled", 1))
    with pytest.raises(Stop):
        write_cache(cache, 10, 6, before_shard=stop_at("labeled", 2))
    assert write_cache(cache, 10, 6) == [("labeled", 2), ("unlabeled", 1)]
    assert contents(cache) == whole


@pytest.mark.parametrize("num_labeled", [16, 18, 24])
def test_segments_are_committed_as_they_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_labeled: int
) -> None:
    set_shards_per_folder(monkeypatch.setattr, 2)
    entries: dict[tuple[str, int], int] = {}
    cache = tmp_path / "cache"

    def count(split: str, shard_idx: int) -> None:
        entries[split, shard_idx] = len(read_manifest(cache).index)

    write_cache(cache, num_labeled, 5, before_shard=count)
    assert all(entries["labeled", idx] == idx // 2 for idx in range(num_labeled // 4))
    assert sorted(path.name for path in (cache / "labeled").iterdir()) == [
        f"{folder:03d}" for folder in range(-(-num_labeled // 8))
    ]
    assert len(CacheReader(cache).sidecars) == -(-num_labeled // 4)
    assert verify(cache).problems == ()


@pytest.mark.parametrize("at", range(6))
def test_goes_on_across_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    set_shards_per_folder(monkeypatch.setattr, 2)
    cache = tmp_path / "cache"
    with pytest.raises(Stop):
        write_cache(cache, 22, before_shard=stop_at("labeled", at))
    assert write_cache(cache, 22) == [("labeled", idx) for idx in range(at, 6)]
    assert write_cache(cache, 27) == [("labeled", 5), ("labeled", 6)]
    write_cache(tmp_path / "fresh", 27)
    assert contents(cache) == contents(tmp_path / "fresh")


def test_indexed_shards_are_not_read_again_while_a_run_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_shards_per_folder(monkeypatch.setattr, 2)
    cache = tmp_path / "cache"
    with pytest.raises(Stop):
        write_cache(cache, 20, before_shard=stop_at("labeled", 3))
    read: list[Path] = []
    read_text = Path.read_text

    def record(path: Path, *args: Any, **kwargs: Any) -> str:
        read.append(path)
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", record)
    assert write_cache(cache, 20) == [("labeled", 3), ("labeled", 4)]
    assert [path.name for path in read if path.parent.parent.name == "labeled"] == ["000002.json"]


def test_more_than_a_thousand_shards(tmp_path: Path, store: str) -> None:
    """With the real constant: two sub-folders, two segments; resumed across the boundary."""
    if store != DEFAULT_STORE:
        pytest.skip("the store has no part in it, and a thousand groups take long")
    cache, num_shards = tmp_path / "cache", SHARDS_PER_FOLDER + 2
    with pytest.raises(Stop):
        write_cache(cache, 4 * num_shards, before_shard=stop_at("labeled", SHARDS_PER_FOLDER + 1))
    assert [entry["path"] for entry in read_manifest(cache).index] == ["index/labeled-000000.arrow"]
    assert write_cache(cache, 4 * num_shards) == [("labeled", SHARDS_PER_FOLDER + 1)]
    assert (cache / "labeled/001/001001.arrow").is_file()
    reader = CacheReader(cache)
    assert len(reader.sidecars) == num_shards
    wanted = reader.sidecars[SHARDS_PER_FOLDER].first_id
    assert reader.find(wanted) == [sum(one.num_samples for one in reader.sidecars[:-2])]


def test_a_full_disk_stops_with_a_sentence_and_the_rerun_goes_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    full = tmp_path / "full"
    calls: list[int] = []
    limit = {"arrow": 20, "zarr": 60}[store]  # in the third shard or so

    def refuse_after_some(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(commit.os, "fsync", refuse_after_some)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        write_cache(full, 10, 6)
    monkeypatch.setattr(commit.os, "fsync", calls.append)
    done = [(split, idx) for split, idx in ALL if read_sidecar(full, split, idx) is not None]
    assert 0 < len(done) < len(ALL)
    assert not any(path.name.endswith(".tmp") for path in full.rglob("*"))
    assert write_cache(full, 10, 6) == ALL[len(done) :]
    assert contents(full) == contents(cache)


def test_finishing_early_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    plans = make_plans(10)
    with CacheWriter(tmp_path, make_manifest(plans), plans, overwrite=False) as to:
        to.begin(write_teacher_files)
        commit_shard(to, plans, "labeled", 1)
        with pytest.raises(AssertionError, match="before every shard was committed"):
            to.finish()
        assert [sidecar.shard_idx for sidecar in to.committed()] == [1]


def test_a_second_writer_is_refused(cache: Path) -> None:
    plans = make_plans(10, 6)
    with (
        CacheWriter(cache, make_manifest(plans), plans, overwrite=False),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        write_cache(cache, 10, 6)
