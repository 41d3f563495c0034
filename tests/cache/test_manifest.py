from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import (
    MANIFEST_NAME,
    Manifest,
    NotACacheError,
    read_manifest,
    utc_now,
)
from teacher_cache.cache.schema import FORMAT_VERSION
from tests.small_caches import make_manifest, make_plans, read_unchecked


@pytest.fixture
def manifest() -> Manifest:
    return make_manifest(make_plans(10, 6))


def _change(cache: Path, **change: Any) -> None:
    (cache / MANIFEST_NAME).write_text(json.dumps(read_unchecked(cache) | change))


def test_survives_the_disk(tmp_path: Path, manifest: Manifest) -> None:
    entry = {"path": "index/labeled-000000.arrow", "sha256": "00"}
    manifest = replace(manifest, index=(entry,), teacher_files={"config.json": "11"})
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    done = manifest.completed(manifest.splits)
    done.write(tmp_path)
    assert read_manifest(tmp_path) == done
    assert done.complete and done.completed_at is not None and not manifest.complete


def test_says_what_it_is_to_a_reader_of_json(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    value = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert (value["format"], value["format_version"]) == ("teacher-cache", 1)
    assert "store" not in value  # as every release wrote it: those before Zarr read it, too
    replace(manifest, store="zarr").write(tmp_path)
    value = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert (value["store"], value["format_version"]) == ("zarr", 2)
    assert value["schema"][3] == {
        "name": "class_logits",
        "dtype": "float32",
        "shape": [3],
        "nullable": False,
    }


def test_times_sort_as_text() -> None:
    times = [utc_now() for _ in range(20)]
    assert times == sorted(times)
    assert {len(time) for time in times} == {len("2026-01-01T00:00:00.000000+00:00")}


def test_a_missing_one(tmp_path: Path) -> None:
    for cache in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotACacheError, match=r"is no cache .it has no manifest.json.: give a"):
            read_manifest(cache)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2", None, 1.5])
def test_a_newer_or_odd_format_version(tmp_path: Path, manifest: Manifest, version: Any) -> None:
    manifest.write(tmp_path)
    _change(tmp_path, format_version=version)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert f"has format version {version!r}, this release reads" in str(caught.value)
    assert "upgrade teacher-cache, or make the cache again" in str(caught.value)


def test_a_newer_format_is_named_even_where_its_fields_differ(
    tmp_path: Path, manifest: Manifest
) -> None:
    manifest.write(tmp_path)
    _change(tmp_path, format_version=99, schema="elsewhere", splits=None, unheard_of=1)
    with pytest.raises(UserError, match="upgrade teacher-cache"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b'{"format": "teacher-cache"', b"\xff\xfe", b"\0" * 9])
def test_damaged_text(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(UserError, match=r"manifest.json is damaged .*with --overwrite"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"teacher-cache"', "{}", '{"name": "my app"}'])
def test_another_programs_file(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(NotACacheError, match="its format is not 'teacher-cache'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"unheard_of": 1},
        {"schema": [{"name": "label"}]},
        {"schema": [1]},
        {"splits": []},
        {"splits": {"labeled": {"num_documents": 1}}},
        {"index": None},
    ],
)
def test_fields_that_are_not_ours(
    tmp_path: Path, manifest: Manifest, change: dict[str, Any]
) -> None:
    manifest.write(tmp_path)
    _change(tmp_path, **change)
    with pytest.raises(UserError, match=r"lacks or adds fields .*with --overwrite"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["settings", "splits", "schema", "created_at"])
def test_a_field_that_is_gone(tmp_path: Path, manifest: Manifest, name: str) -> None:
    manifest.write(tmp_path)
    value = read_unchecked(tmp_path)
    del value[name]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(value))
    with pytest.raises(UserError, match="lacks or adds fields"):
        read_manifest(tmp_path)
