from __future__ import annotations

import json
from pathlib import Path

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, Manifest
from teacher_cache.pipeline.commands import newest_cache
from tests.small_caches import read_unchecked


def write_cache(folder: Path, *, completed_at: str | None) -> Path:
    folder.mkdir(parents=True)
    manifest = Manifest(
        fingerprint="",
        settings={},
        layout={},
        schema=(),
        splits={},
        about={},
        teacher_files={},
        versions={},
        complete=completed_at is not None,
        created_at="2026-01-01T00:00:00.000000+00:00",
        completed_at=completed_at,
    )
    manifest.write(folder)
    return folder


def test_the_newest_is_the_one_whose_manifest_is_newest(tmp_path: Path) -> None:
    # Neither the names' order nor the files' times: a copied or touched cache is no newer.
    newest = write_cache(tmp_path / "a", completed_at="2026-03-01T00:00:00.000002+00:00")
    write_cache(tmp_path / "b", completed_at="2026-03-01T00:00:00.000001+00:00")
    write_cache(tmp_path / "c", completed_at="2026-02-28T23:59:59.999999+00:00")
    assert newest_cache(tmp_path) == newest


def test_an_incomplete_cache_is_passed_over(tmp_path: Path) -> None:
    write_cache(tmp_path / "running", completed_at=None)
    complete = write_cache(tmp_path / "done", completed_at="2026-03-01T00:00:00.000000+00:00")
    assert newest_cache(tmp_path) == complete


def test_other_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("")
    complete = write_cache(tmp_path / "done", completed_at="2026-03-01T00:00:00.000000+00:00")
    assert newest_cache(tmp_path) == complete


@pytest.mark.parametrize("exists", [False, True])
def test_without_a_complete_cache_the_way_to_one_is_named(tmp_path: Path, exists: bool) -> None:
    if exists:
        write_cache(tmp_path / "caches" / "running", completed_at=None)
    with pytest.raises(UserError, match=r"no complete cache .* `pipe cache-teacher .* --cache"):
        newest_cache(tmp_path / "caches")


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "newer", completed_at="2026-03-01T00:00:00.000000+00:00")
    value = read_unchecked(folder)
    (folder / MANIFEST_NAME).write_text(json.dumps(value | {"format_version": 99}))
    with pytest.raises(UserError, match=r"newer.*version 99"):
        newest_cache(tmp_path)
