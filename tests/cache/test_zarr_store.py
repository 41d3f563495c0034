"""The Zarr store beside the Arrow store: the same fields, and no byte that nobody watches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Fields, FieldSpec, Ragged, Schema, check_fields
from teacher_cache.cache.sidecar import Sidecar, read_sidecar
from teacher_cache.cache.stores.interface import Shard
from teacher_cache.cache.stores.named import STORES, store_named
from teacher_cache.cache.stores.zarr import ZarrStore, encode
from teacher_cache.cache.verify import verify
from tests.small_caches import SCHEMA, contents, make_fields, write_cache

# Every type and every kind of shape that a cache has.
WIDE: Schema = (
    FieldSpec(name="sample_id", dtype="V16"),
    FieldSpec(name="input_ids", dtype="uint32", shape=("S",)),
    FieldSpec(name="label", dtype="int32", nullable=True),
    FieldSpec(name="class_logits", dtype="float32", shape=(3,)),
    FieldSpec(name="square", dtype="float16", shape=(2, 3)),
    FieldSpec(name="loss_mask", dtype="bool", shape=("S",)),
    FieldSpec(name="segment", dtype="uint16", shape=("S",)),
    FieldSpec(name="offsets", dtype="uint32", shape=("S+1",)),
    FieldSpec(name="tail", dtype="float16", shape=("S", 5)),
    FieldSpec(name="maps", dtype="uint8", shape=("S", 2, 3)),
    FieldSpec(name="sizes", dtype="uint16", shape=("S",)),
    FieldSpec(name="entries", dtype="uint8", shape=("sum(sizes)",)),
    FieldSpec(name="plane", dtype="uint8", shape=("sum(sizes)/4",)),
)


@pytest.fixture(autouse=True, scope="module")
def no_power_is_cut() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _random_bits(rng: np.random.Generator, spec: FieldSpec, num_rows: int) -> np.ndarray:
    """Any bits that the type has: NaNs with payloads, infinities, -0."""
    shape, dtype = (num_rows, *spec.inner_shape), np.dtype(spec.dtype)
    if spec.dtype == "bool":
        return rng.integers(2, size=shape).astype(bool)
    if spec.name == "label":
        return rng.integers(-1, 2**31, size=shape).astype(np.int32)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(num_bytes), dtype).reshape(shape)


def _wide_fields(lengths: list[int], seed: int) -> Fields:
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(4, size=length).astype(np.uint16) for length in lengths]
    counted = [int(one.sum()) for one in sizes]
    ragged = {
        "S": lengths,
        "S+1": [length + 1 for length in lengths],
        "sum(sizes)": counted,
        "sum(sizes)/4": [-(-one // 4) for one in counted],
    }
    fields: Fields = {}
    for spec in WIDE:
        if spec.name == "sizes":
            fields[spec.name] = Ragged.from_arrays(sizes, "uint16")
        elif spec.is_ragged:
            rows = [_random_bits(rng, spec, num) for num in ragged[str(spec.shape[0])]]
            fields[spec.name] = Ragged.from_arrays(rows, spec.dtype, spec.inner_shape)
        else:
            fields[spec.name] = _random_bits(rng, spec, len(lengths))
    return fields


def _written(folder: Path, store: str, schema: Schema, fields: Fields) -> Shard:
    chosen = store_named(store)
    path = folder / f"shard{chosen.suffix}"
    stored = chosen.write(path, schema, fields)
    stored.verify(path)
    return chosen.open(path, schema, stored, num_samples=len(fields["sample_id"]))


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 9), max_size=70), seed=st.integers(0, 2**32 - 1))
def test_every_store_gives_back_every_bit(lengths: list[int], seed: int) -> None:
    fields = _wide_fields(lengths, seed)
    assert check_fields(WIDE, fields) == len(lengths)
    with tempfile.TemporaryDirectory() as folder:
        for store in STORES:
            shard = _written(Path(folder), store, WIDE, fields)
            assert len(shard) == len(lengths)
            assert shard.lengths().tolist() == lengths
            assert shard.lengths().dtype == np.int64
            for idx in range(len(lengths)):
                sample = shard.sample(idx)
                for spec in WIDE:
                    wanted, found = fields[spec.name][idx], sample[spec.name]
                    assert (found.dtype, found.shape) == (np.dtype(spec.dtype), wanted.shape)
                    assert found.tobytes() == wanted.tobytes(), (store, spec.name)
            parts = list(shard.batches())
            for spec in WIDE:
                columns = [part[spec.name] for part in parts]
                bits = [column[i].tobytes() for column in columns for i in range(len(column))]
                wanted = [fields[spec.name][i].tobytes() for i in range(len(lengths))]
                assert bits == wanted


def test_samples_are_views_that_nobody_can_write_to(tmp_path: Path) -> None:
    shard = _written(tmp_path, "zarr", WIDE, _wide_fields([3, 0, 5], 0))
    sample = shard.sample(2)
    for spec in WIDE:
        if spec.shape:
            assert not sample[spec.name].flags.owndata and not sample[spec.name].flags.writeable


def test_a_view_outlives_its_shard_and_its_files(tmp_path: Path) -> None:
    fields = _wide_fields([3, 7], 1)
    kept = _written(tmp_path, "zarr", WIDE, fields).sample(1)["tail"]
    shutil.rmtree(tmp_path / "shard.zarr")
    assert kept.tobytes() == fields["tail"][1].tobytes()


def test_equal_fields_have_equal_files() -> None:
    first, second = (encode(WIDE, _wide_fields([4, 0, 2], 3)) for _ in range(2))
    assert first == second and list(first) == sorted(first)


def test_plain_zarr_reads_it(tmp_path: Path) -> None:
    fields = _wide_fields([3, 0, 5], 4)
    _written(tmp_path, "zarr", WIDE, fields)
    group = zarr.open_group(tmp_path / "shard.zarr", mode="r")
    assert group.attrs["num_samples"] == 3
    sharing = {"position_offsets", "border_offsets", "sum_sizes_offsets", "sum_sizes_4_offsets"}
    assert set(group.array_keys()) == {spec.name for spec in WIDE} | sharing
    for spec in WIDE:
        array: Any = group[spec.name]
        values = np.asarray(array[:])
        column = fields[spec.name]
        assert "crc32c" in str(array.metadata.codecs).lower()
        if isinstance(column, Ragged):
            offsets: Any = group[array.attrs["offsets"]]
            np.testing.assert_array_equal(np.asarray(offsets[:]), column.offsets)
            column = column.values
        if spec.dtype == "V16":
            values = values.reshape(-1).view("V16")
        assert values.dtype == np.dtype(spec.dtype)
        assert values.tobytes() == column.tobytes(), spec.name


def test_what_does_not_fit_the_schema_is_refused() -> None:
    with pytest.raises(UserError, match="the fields are"):
        encode(SCHEMA, {})


SHARD = ("labeled", 1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache", 10, store="zarr")
    return tmp_path / "cache"


def _sidecar(cache: Path) -> Sidecar:
    found = read_sidecar(cache, *SHARD)
    assert found is not None
    return found


def test_the_sidecar_lists_every_file(cache: Path) -> None:
    sidecar = _sidecar(cache)
    folder = cache / sidecar.path
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {file.path for file in sidecar.files} == there
    assert {"zarr.json", "label/zarr.json", "label/c/0", "class_logits/c/0/0"} <= there
    assert sidecar.num_bytes == sum((folder / name).stat().st_size for name in there)
    assert Sidecar.from_json(sidecar.to_json()) == sidecar


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << (bit % 8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, int], Any]] = {
    "flipped": _flip,
    "deleted": lambda path, _: path.unlink(),
    "cut": lambda path, bit: os.truncate(path, bit % path.stat().st_size),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_named_and_only_its_shard_rebuilt(
    cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, sidecar = contents(cache), _sidecar(cache)
    files = [f"{sidecar.path}/{file.path}" for file in sidecar.files]
    rng = np.random.default_rng(0)
    for name in [*files, "labeled/000/000001.json"]:
        DAMAGES[damage](cache / name, int(rng.integers(2**20)))
        (problem,) = verify(cache).problems
        named = name if name in files or damage != "deleted" else sidecar.path
        assert named in problem or (sidecar.path in problem and name not in files)
        caplog.clear()
        assert write_cache(cache, 10, store="zarr") == [SHARD], name
        assert contents(cache) == whole


def test_a_bit_anywhere_is_found_before_a_sample_is_given_out(cache: Path) -> None:
    sidecar = _sidecar(cache)
    rng = np.random.default_rng(1)
    first = CacheReader(cache).sidecars[0].num_samples
    for file in sidecar.files:
        path = cache / sidecar.path / file.path
        whole = path.read_bytes()
        for bit in rng.integers(8 * len(whole), size=20).tolist():
            _flip(path, bit)
            with pytest.raises(BadShardError, match=f"{file.path} differs from its SHA-256"):
                sidecar.verify(cache)
            reader = CacheReader(cache)
            reader.sample(0)
            with pytest.raises(BadShardError, match=f"{file.path} differs from its checksum"):
                reader.sample(first)
            path.write_bytes(whole)


def test_plain_zarr_makes_values_up_where_the_reader_refuses(cache: Path) -> None:
    """Why the sidecar lists chunks: nothing else knows that there was one."""
    path = cache / _sidecar(cache).path
    (path / "class_logits/c/0/0").unlink()
    group: Any = zarr.open_group(path, mode="r")
    assert np.isnan(group["class_logits"][:]).all()
    with pytest.raises(BadShardError, match="class_logits/c/0/0 has no bytes, its sidecar says"):
        list(CacheReader(cache).batches())


def test_lengths_read_the_offsets_and_nothing_else(cache: Path) -> None:
    reader = CacheReader(cache)
    lengths = reader.lengths().tolist()
    path = cache / _sidecar(cache).path
    _flip(path / "class_logits/c/0/0", 3)
    assert CacheReader(cache).lengths().tolist() == lengths
    _flip(path / "position_offsets/c/0", 3)
    with pytest.raises(BadShardError, match="position_offsets/c/0 differs from its checksum"):
        CacheReader(cache).lengths()


def test_a_list_of_files_that_was_altered_is_refused(cache: Path) -> None:
    sidecar = _sidecar(cache)
    with pytest.raises(BadShardError, match="its sidecar's list of files is damaged"):
        replace(sidecar, files=sidecar.files[1:]).verify(cache)


def test_a_chunk_of_another_schema_is_no_crash(tmp_path: Path) -> None:
    fields = make_fields("labeled", range(4))
    stored = ZarrStore().write(tmp_path / "a.zarr", SCHEMA, fields)
    other = (*SCHEMA[:3], FieldSpec(name="class_logits", dtype="float32", shape=(4,)))
    with pytest.raises(BadShardError, match="class_logits does not hold the"):
        ZarrStore().open(tmp_path / "a.zarr", other, stored, num_samples=4).sample(0)


@pytest.mark.parametrize(("there", "asked"), [("arrow", "zarr"), ("zarr", "arrow")])
def test_the_other_format_is_refused_by_name(tmp_path: Path, there: str, asked: str) -> None:
    write_cache(tmp_path, 5, store=there)
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        write_cache(tmp_path, 5, store=asked)
    assert f"format is {there!r} there and {asked!r} in this command" in str(caught.value)
    assert "another --out" in str(caught.value)
    assert contents(tmp_path) == before


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="format 'zar' is unknown to this release: did you mean"):
        store_named("zar")
