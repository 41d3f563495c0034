from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.sidecar import (
    Sidecar,
    read_segment,
    read_sidecar,
    segment_path,
    write_segment,
)
from tests.small_caches import write_cache


@pytest.fixture
def sidecars(tmp_path: Path) -> list[Sidecar]:
    write_cache(tmp_path / "cache", 10)
    found = [read_sidecar(tmp_path / "cache", "labeled", shard_idx) for shard_idx in range(3)]
    return [sidecar for sidecar in found if sidecar is not None]


def test_gives_back_the_sidecars(tmp_path: Path, sidecars: list[Sidecar]) -> None:
    entry = write_segment(tmp_path, "labeled", 2, sidecars)
    path = tmp_path / segment_path("labeled", 2)
    assert path == tmp_path / "index" / "labeled-000002.arrow"
    assert entry == {
        "path": "index/labeled-000002.arrow",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert read_segment(tmp_path, entry) == sidecars


def test_is_a_plain_table_with_a_row_a_shard(tmp_path: Path, sidecars: list[Sidecar]) -> None:
    entry = write_segment(tmp_path, "labeled", 0, sidecars)
    table = pa.ipc.open_file(tmp_path / entry["path"]).read_all()
    assert table["path"].to_pylist() == [f"labeled/000/{idx:06d}.arrow" for idx in range(3)]
    assert table["num_samples"].to_pylist() == [4, 3, 2]  # document 5 is empty
    assert table["num_tokens"].to_pylist() == [sidecar.num_tokens for sidecar in sidecars]
    assert table["num_bytes"].to_pylist() == [sidecar.num_bytes for sidecar in sidecars]


def test_is_replaced_whole_and_equal_sidecars_give_equal_bytes(
    tmp_path: Path, sidecars: list[Sidecar]
) -> None:
    first = write_segment(tmp_path, "labeled", 0, sidecars)
    shorter = write_segment(tmp_path, "labeled", 0, sidecars[:1])
    assert read_segment(tmp_path, shorter) == sidecars[:1]
    assert write_segment(tmp_path, "labeled", 0, sidecars) == first
    changed = [replace(sidecars[0], num_truncated=99), *sidecars[1:]]
    assert write_segment(tmp_path, "labeled", 0, changed) != first


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "replaced"])
def test_damage_is_refused(tmp_path: Path, sidecars: list[Sidecar], damage: str) -> None:
    entry = write_segment(tmp_path, "labeled", 0, sidecars)
    path = tmp_path / entry["path"]
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "replaced":
        write_segment(tmp_path, "labeled", 0, sidecars[:2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data if damage == "flipped" else data[:-1])
    with pytest.raises(BadShardError) as caught:
        read_segment(tmp_path, entry)
    assert str(path) in str(caught.value)
    assert "rebuilds the index from the sidecars" in str(caught.value)
