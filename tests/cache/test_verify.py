from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.cache.verify import verify
from tests.small_caches import (
    ONE_FILE,
    contents,
    read_unchecked,
    set_shards_per_folder,
    shard_file,
    write_cache,
)

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path, 10, 6)
    return tmp_path


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _edit_manifest(cache: Path, **change: Any) -> None:
    """As an older release could have written it, which gave it no checksum."""
    (cache / MANIFEST_NAME).write_text(json.dumps(read_unchecked(cache) | change))


def test_a_sound_cache_has_no_problem(cache: Path) -> None:
    seen: list[Sidecar] = []
    report = verify(cache, on_shard=seen.append)
    assert report.problems == ()
    assert report.num_shards == len(seen) == 5
    sizes = [summary.num_bytes for summary in read_manifest(cache).splits.values()]
    assert report.num_bytes == sum(sizes) > 0


def test_only_looks(cache: Path) -> None:
    _flip(shard_file(cache, "labeled", 0))
    before = contents(cache)
    verify(cache)
    assert contents(cache) == before


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "shard": (
        lambda cache: _flip(shard_file(cache, "labeled", 1)),
        "labeled/000/000001{file}",
        "differs from its SHA-256",
    ),
    "shard cut": (
        lambda cache: os.truncate(shard_file(cache, "labeled", 1), 5),
        "labeled/000/000001{file}",
        "has 5 bytes, its sidecar says",
    ),
    "shard gone": (
        lambda cache: shard_file(cache, "unlabeled", 1).unlink(),
        "unlabeled/000/000001{file}",
        "has no bytes, its sidecar says",
    ),
    "sidecar gone": (
        lambda cache: (cache / "labeled/000/000002.json").unlink(),
        "labeled/000/000002{suffix}",
        "sidecar is missing or not the index's",
    ),
    "sidecar other": (
        lambda cache: _edit(cache / "labeled/000/000002.json", num_tokens=1),
        "labeled/000/000002{suffix}",
        "sidecar is missing or not the index's",
    ),
    "sidecar unreadable": (
        lambda cache: (cache / "labeled/000/000002.json").write_bytes(b"\xff{"),
        "labeled/000/000002.json",
        "is no readable sidecar",
    ),
    "sidecar of other fields": (
        lambda cache: _edit(cache / "labeled/000/000002.json", more=1),
        "labeled/000/000002.json",
        "is no readable sidecar (fields are missing or unknown)",
    ),
    "teacher file": (
        lambda cache: _flip(cache / "teacher/tokenizer.json"),
        "teacher/tokenizer.json",
        "is missing or differs from its SHA-256",
    ),
    "teacher file gone": (
        lambda cache: (cache / "teacher/config.json").unlink(),
        "teacher/config.json",
        "is missing or differs from its SHA-256",
    ),
    "settings": (
        lambda cache: _edit_manifest(cache, settings={"max_length": 9}),
        MANIFEST_NAME,
        "the settings do not have the fingerprint",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found_and_named_once(cache: Path, store: str, damage: str) -> None:
    inflict, name, words = DAMAGES[damage]
    name = name.format(file=ONE_FILE[store], suffix=f".{store}")
    inflict(cache)
    (problem,) = verify(cache).problems
    assert str(cache / name) in problem and words in problem


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_bad_segment_is_named_with_what_it_hides(cache: Path, is_gone: bool) -> None:
    path = cache / "index/labeled-000000.arrow"
    path.unlink() if is_gone else _flip(path)
    problems = verify(cache).problems
    assert len(problems) == 2
    assert str(path) in problems[0] and "is missing or differs from its SHA-256" in problems[0]
    assert problems[1] == "the index lists 0 labeled shards, the manifest 3"


def test_all_damage_is_listed(cache: Path) -> None:
    _flip(shard_file(cache, "labeled", 1))
    _flip(shard_file(cache, "unlabeled", 0))
    (cache / "teacher/config.json").unlink()
    assert len(verify(cache).problems) == 3


def test_of_an_incomplete_cache_the_committed_shards_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_shards_per_folder(monkeypatch.setattr, 2)

    def stop(split: str, shard_idx: int) -> None:
        if shard_idx == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, 20, before_shard=stop)
    report = verify(tmp_path)
    assert report.num_shards == 3
    (problem,) = report.problems
    assert "is not complete: run the same `pipe cache-teacher` again" in problem
    _flip(shard_file(tmp_path, "labeled", 0))  # indexed
    _flip(shard_file(tmp_path, "labeled", 2, folder=1))  # known by its sidecar alone
    assert len(verify(tmp_path).problems) == 3


def test_a_shard_that_the_index_lacks(cache: Path) -> None:
    manifest = read_manifest(cache)
    replace(manifest, index=manifest.index[:1]).write(cache)
    assert verify(cache).problems == ("the index lists 0 unlabeled shards, the manifest 2",)


def test_no_cache_and_newer_formats_are_the_users(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no cache"):
        verify(tmp_path / "teacher")
    _edit_manifest(cache, format_version=99)
    with pytest.raises(UserError, match="upgrade teacher-cache"):
        verify(cache)


def test_any_flipped_bit_of_the_manifest_is_found(cache: Path) -> None:
    path = cache / MANIFEST_NAME
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for place, bit in zip(
        rng.choice(len(data), 300, replace=False), rng.integers(0, 8, 300), strict=True
    ):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises((UserError, CheckFailed)):
            verify(cache)
    path.write_bytes(data)
    assert verify(cache).problems == ()


@pytest.mark.parametrize("change", [{"schema": []}, {"splits": {}}, {"about": {"id2label": {}}}])
def test_a_changed_manifest_is_named(cache: Path, change: dict[str, Any]) -> None:
    _edit(cache / MANIFEST_NAME, **change)
    with pytest.raises(CheckFailed, match=r"manifest.json differs from its own checksum: restore"):
        verify(cache)
