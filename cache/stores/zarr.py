"""The Zarr store: one v3 group a shard, which zarr and xarray open as it lies there.

Each field is one flat array of one chunk: the bytes, little-endian, and behind them their CRC32C.
A field whose size depends on the sample lies end to end along its first axis, and an array of
offsets says where each sample begins: one for all fields that are ragged alike. zarr writes these
files; what reads them back here maps them, since a chunk without compression *is* the array, and
checks every file of the shard first: zarr itself reads a chunk that was deleted as fill values.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from teacher_cache.cache.commit import replace_folder
from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.schema import ABSENT_LABEL, Fields, FieldSpec, Ragged, Schema, check_fields
from teacher_cache.cache.stores.interface import (
    REMEDY,
    Stored,
    StoredFile,
    listing_sha256,
    require_size,
)

CRC_BYTES = 4
OFFSET_DTYPE = "int64"
_AXES = {"S": "position", "S+1": "border"}


class ZarrStore:
    """A folder a shard, written under a temporary name and published by its sidecar."""

    suffix = ".zarr"
    format_version = 2
    libraries = ("zarr",)

    def write(self, path: Path, schema: Schema, fields: Fields) -> Stored:
        """Commit a shard's group.

        Raises:
            UserError: if the fields do not fit the schema or the file system refuses.
        """
        data = encode(schema, fields)
        replace_folder(path, data)
        files = tuple(
            StoredFile(
                path=name,
                num_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                crc32c=google_crc32c.value(content),
            )
            for name, content in data.items()
        )
        return Stored(
            num_bytes=sum(file.num_bytes for file in files),
            sha256=listing_sha256(files),
            files=files,
        )

    def open(self, path: Path, schema: Schema, stored: Stored, *, num_samples: int) -> ZarrShard:
        """Open a shard that was committed.

        Raises:
            BadShardError: if one of its files is missing or of another size.
        """
        return ZarrShard(path, schema, stored, num_samples)


STORE = ZarrStore()


def encode(schema: Schema, fields: Fields) -> dict[str, bytes]:
    """A shard's group as its files' bytes by path, in the order of their paths.

    Raises:
        UserError: if the fields do not fit the schema.
    """
    import zarr  # only a writer needs it; a reader need not wait for it to load
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    num_samples = check_fields(schema, fields)
    files: dict[str, Any] = {}
    group = zarr.create_group(
        MemoryStore(files), zarr_format=3, attributes={"num_samples": num_samples}
    )
    for name, (array, described) in _arrays(schema, fields).items():
        group.create_array(
            name,
            data=array,
            chunks=tuple(max(size, 1) for size in array.shape),
            filters=None,
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},  # a chunk of zeros is a file like any other
            **described,
        )
    return {name: files[name].to_bytes() for name in sorted(files)}


def _arrays(schema: Schema, fields: Fields) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Each array of the group, with what zarr is told of it."""
    arrays: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    for spec in schema:
        column = fields[spec.name]
        attributes: dict[str, Any] = {}
        if isinstance(column, Ragged):
            axis, offsets = _axis(spec), _offsets_name(spec)
            attributes["offsets"] = offsets
            kept, _ = arrays.setdefault(
                offsets,
                (column.offsets, {"dimension_names": ["sample_border"], "fill_value": -1}),
            )
            assert np.array_equal(kept, column.offsets), f"{spec.shape[0]} has two meanings"
        else:
            axis = "sample"
        if spec.nullable:
            attributes["missing"] = ABSENT_LABEL
        values = _as_written(column.values if isinstance(column, Ragged) else column)
        names = [axis, *(f"{spec.name}_{number}" for number in range(1, values.ndim))]
        described = {"dimension_names": names, "attributes": attributes}
        arrays[spec.name] = values, described | {"fill_value": _fill_value(spec, values)}
    return arrays


def _as_written(values: np.ndarray) -> np.ndarray:
    """Raw bytes as u8 in an axis of their own: not every reader of Zarr knows another type."""
    if values.dtype.kind != "V":
        return np.ascontiguousarray(values)
    flat = np.frombuffer(values.tobytes(), np.uint8)
    return flat.reshape(len(values), values.dtype.itemsize)


def _fill_value(spec: FieldSpec, values: np.ndarray) -> float:
    """What plain zarr reads where a chunk was lost: as unlike a value as the type allows."""
    if spec.nullable:
        return ABSENT_LABEL
    return math.nan if values.dtype.kind == "f" else 0


def _axis(spec: FieldSpec) -> str:
    """The name of the axis along which a ragged field's samples lie end to end."""
    dimension = str(spec.shape[0])
    return _AXES.get(dimension) or re.sub(r"\W+", "_", dimension).strip("_")


def _offsets_name(spec: FieldSpec) -> str:
    return f"{_axis(spec)}_offsets"


class ZarrShard:
    """A shard whose files are mapped, all of them checked before the first sample is given out.

    Where arrays lie and how they are shaped is known from the manifest's schema and the sidecar,
    whose list of files also has the metadata: a file that says otherwise has another checksum.

    Args:
        path: the group's folder.
        schema: of the cache.
        stored: of the sidecar.
        num_samples: the same.

    Raises:
        BadShardError: if a file is missing or of another size.
    """

    def __init__(self, path: Path, schema: Schema, stored: Stored, num_samples: int):
        self.path = path
        self._schema = schema
        self._files = {file.path: file for file in stored.files}
        self._num_samples = num_samples
        self._checked: dict[str, pa.Buffer] = {}
        self._fields: Fields | None = None
        for file in stored.files:
            require_size(path / file.path, file.num_bytes)

    def __len__(self) -> int:
        """The number of samples."""
        return self._num_samples

    def sample(self, sample_idx: int) -> dict[str, np.ndarray]:
        """One sample's fields: views of the mapped files.

        Raises:
            BadShardError: if a file of the shard differs from its checksum.
        """
        return {name: column[sample_idx] for name, column in self._all().items()}

    def lengths(self) -> np.ndarray:
        """Positions of each sample, [N] int64, from the offsets alone.

        Raises:
            BadShardError: if they differ from their checksum.
        """
        spec = next(one for one in self._schema if one.name == "input_ids")
        return np.diff(self._offsets(spec))

    def batches(self) -> Iterator[Fields]:
        """The whole shard's fields, at once.

        Raises:
            BadShardError: if a file of the shard differs from its checksum.
        """
        yield self._all()

    def _all(self) -> Fields:
        if self._fields is None:
            for name in self._files:
                self._read(name)
            self._fields = {spec.name: self._column(spec) for spec in self._schema}
        return self._fields

    def _column(self, spec: FieldSpec) -> np.ndarray | Ragged:
        if not spec.is_ragged:
            return self._array(spec, self._num_samples)
        offsets = self._offsets(spec)
        return Ragged(values=self._array(spec, int(offsets[-1])), offsets=offsets)

    def _array(self, spec: FieldSpec, num_rows: int) -> np.ndarray:
        """A field's array [rows, *inner shape], a view."""
        dtype = np.dtype(spec.dtype)
        num_axes = 1 + len(spec.inner_shape) + (dtype.kind == "V")
        values = self._values(spec.name, num_axes, dtype, num_rows * math.prod(spec.inner_shape))
        return values.reshape(num_rows, *spec.inner_shape)

    def _offsets(self, spec: FieldSpec) -> np.ndarray:
        dtype = np.dtype(OFFSET_DTYPE)
        return self._values(_offsets_name(spec), 1, dtype, self._num_samples + 1)

    def _values(self, name: str, num_axes: int, dtype: np.dtype, num: int) -> np.ndarray:
        """The values of an array's only chunk; an array of no values has none."""
        little = dtype.newbyteorder("<")
        if not num:
            return np.empty(0, little)
        data = self._read("/".join([name, "c", *("0" * num_axes)]))
        if data.size != num * dtype.itemsize + CRC_BYTES:
            raise self._damaged(name, f"does not hold the {num:,} values that its shard says")
        return np.frombuffer(data, little, count=num)

    def _read(self, name: str) -> pa.Buffer:
        """A file's bytes, mapped and checked once; its descriptor is closed, the mapping stays."""
        if name in self._checked:
            return self._checked[name]
        file = self._files.get(name)
        if file is None:
            raise self._damaged(name, "is not in the sidecar's list")
        require_size(self.path / name, file.num_bytes)
        with pa.memory_map(str(self.path / name)) as source:
            data = source.read_buffer()
        if google_crc32c.value(data) != file.crc32c:
            raise self._damaged(name, "differs from its checksum")
        self._checked[name] = data
        return data

    def _damaged(self, name: str, found: str) -> BadShardError:
        return BadShardError(f"{self.path / name} {found}: {REMEDY}")
