"""The Arrow store: one uncompressed IPC file a shard, memory-mapped, 64 samples a record batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.schema import ABSENT_LABEL, Fields, FieldSpec, Ragged, Schema, check_fields
from teacher_cache.cache.stores.interface import REMEDY, BatchRange, Stored, require_size

SAMPLES_PER_BATCH = 64
MOST_ENTRIES = 2**31 - 1  # lists end at a number of 32 bits with a sign


class ArrowStore:
    """A file a shard."""

    suffix = ".arrow"
    format_version = 1
    libraries = ()

    def write(self, path: Path, schema: Schema, fields: Fields) -> Stored:
        """Commit a shard's file.

        Raises:
            UserError: if the fields do not fit the schema or the file system refuses.
        """
        data, batches = encode(schema, fields)
        write_bytes_atomically(path, data)
        return Stored(
            num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), batches=tuple(batches)
        )

    def open(self, path: Path, schema: Schema, stored: Stored, *, num_samples: int) -> ArrowShard:
        """Open a shard that was committed; its record batches say how many samples it has.

        Raises:
            BadShardError: if the file is missing or of another size.
        """
        return ArrowShard(path, schema, stored.batches, stored.num_bytes)


STORE = ArrowStore()


def encode(schema: Schema, fields: Fields) -> tuple[bytes, list[BatchRange]]:
    """Lay out a shard as the bytes of an Arrow IPC file.

    Returns:
        The file's bytes and one range per record batch, for the sidecar's checksums.

    Raises:
        UserError: if the fields do not fit the schema.
    """
    num_samples = check_fields(schema, fields)
    arrow_schema = _arrow_schema(schema)
    sink = pa.BufferOutputStream()
    spans: list[tuple[int, int, int]] = []
    with pa.ipc.new_file(sink, arrow_schema) as writer:
        for start in range(0, num_samples, SAMPLES_PER_BATCH):
            stop = min(start + SAMPLES_PER_BATCH, num_samples)
            columns = [_to_arrow(spec, fields[spec.name], start, stop) for spec in schema]
            batch = pa.record_batch(columns, schema=arrow_schema)
            writer.write_batch(batch)
            # Counted from the end: the file's own header comes with the first batch.
            num_bytes = pa.ipc.get_record_batch_size(batch)
            spans.append((sink.tell() - num_bytes, num_bytes, stop - start))
    data = sink.getvalue().to_pybytes()
    batches = [
        BatchRange(
            offset=offset,
            num_bytes=num_bytes,
            num_samples=num_in_batch,
            crc32c=google_crc32c.value(data[offset : offset + num_bytes]),
        )
        for offset, num_bytes, num_in_batch in spans
    ]
    return data, batches


def _arrow_type(spec: FieldSpec) -> pa.DataType:
    dtype = np.dtype(spec.dtype)
    value = pa.binary(dtype.itemsize) if dtype.kind == "V" else pa.from_numpy_dtype(dtype)
    for size in reversed(spec.inner_shape):
        value = pa.list_(value, size)
    return pa.list_(value) if spec.is_ragged else value


def _arrow_schema(schema: Schema) -> pa.Schema:
    return pa.schema(
        [pa.field(spec.name, _arrow_type(spec), nullable=spec.nullable) for spec in schema]
    )


def _to_arrow(spec: FieldSpec, column: np.ndarray | Ragged, start: int, stop: int) -> pa.Array:
    arrow_type = _arrow_type(spec)
    if isinstance(column, Ragged):
        offsets = column.offsets[start : stop + 1]
        if offsets[-1] - offsets[0] > MOST_ENTRIES:
            raise UserError(
                f"the field {spec.name} has {int(offsets[-1] - offsets[0]):,} entries in "
                f"{stop - start} samples, and an Arrow record batch numbers {MOST_ENTRIES:,}: give "
                "a smaller --shard-mb"
            )
        values = _nested(spec, column.values[offsets[0] : offsets[-1]])
        return pa.ListArray.from_arrays(
            pa.array((offsets - offsets[0]).astype(np.int32)), values, type=arrow_type
        )
    part = np.ascontiguousarray(column[start:stop])
    if part.dtype.kind == "V":
        return pa.Array.from_buffers(arrow_type, len(part), [None, pa.py_buffer(part.tobytes())])
    if spec.nullable:
        return pa.array(part, type=arrow_type, mask=part == ABSENT_LABEL)
    return _nested(spec, part)


def _nested(spec: FieldSpec, rows: np.ndarray) -> pa.Array:
    """Arrays [N, *inner shape] as lists of fixed sizes."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    for size in reversed(spec.inner_shape):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


class ArrowShard:
    """A memory-mapped shard; each record batch is checked against its CRC32C when first touched.

    Batches are found by the sidecar's ranges and parsed with the manifest's schema, never by the
    file's own footer: no checksum covers that, and Arrow can crash on a damaged one.

    Raises:
        BadShardError: if the file is missing or of another size.
    """

    def __init__(self, path: Path, schema: Schema, batches: Sequence[BatchRange], num_bytes: int):
        self.path = path
        self._schema = schema
        self._arrow_schema = _arrow_schema(schema)
        self._ranges = batches
        self._starts = np.cumsum([0, *(batch.num_samples for batch in batches)])
        self._checked: dict[int, Fields] = {}
        # The size comes first: reading past a truncated mapping would kill the process.
        require_size(path, num_bytes)
        self._map = pa.memory_map(str(path))

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._starts[-1])

    def sample(self, sample_idx: int) -> dict[str, np.ndarray]:
        """One sample's fields: views of the mapped file.

        Raises:
            BadShardError: if the record batch's bytes differ from their checksum.
        """
        batch_idx = int(np.searchsorted(self._starts, sample_idx, side="right")) - 1
        row = sample_idx - int(self._starts[batch_idx])
        return {name: column[row] for name, column in self._batch(batch_idx).items()}

    def lengths(self) -> np.ndarray:
        """Positions of each sample, [N] int64, read from the list offsets alone (no checksum).

        Raises:
            BadShardError: if a record batch cannot be parsed.
        """
        parts = [
            np.diff(
                np.asarray(self._parsed(batch_idx, self._bytes(batch_idx))["input_ids"].offsets)
            )
            for batch_idx in range(len(self._ranges))
        ]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)

    def batches(self) -> Iterator[Fields]:
        """Every record batch's fields, checked, in order.

        Raises:
            BadShardError: if a record batch's bytes differ from their checksum.
        """
        for batch_idx in range(len(self._ranges)):
            yield self._batch(batch_idx)

    def _batch(self, batch_idx: int) -> Fields:
        if batch_idx not in self._checked:
            data = self._bytes(batch_idx)
            if google_crc32c.value(data) != self._ranges[batch_idx].crc32c:
                raise self._damaged(batch_idx, "differs from its checksum")
            batch = self._parsed(batch_idx, data)
            self._checked[batch_idx] = {
                spec.name: _from_arrow(spec, batch[spec.name]) for spec in self._schema
            }
        return self._checked[batch_idx]

    def _bytes(self, batch_idx: int) -> pa.Buffer:
        self._map.seek(self._ranges[batch_idx].offset)
        return self._map.read_buffer(self._ranges[batch_idx].num_bytes)

    def _parsed(self, batch_idx: int, data: pa.Buffer) -> pa.RecordBatch:
        try:
            batch = pa.ipc.read_record_batch(data, self._arrow_schema)
            batch.validate()  # buffers as long as they must be, so that no read leaves the mapping
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(batch_idx, f"cannot be parsed ({error})") from error
        return batch

    def _damaged(self, batch_idx: int, found: str) -> BadShardError:
        extent = self._ranges[batch_idx]
        return BadShardError(
            f"{self.path}: record batch {batch_idx} (bytes {extent.offset} to "
            f"{extent.offset + extent.num_bytes}) {found}: {REMEDY}"
        )


def _from_arrow(spec: FieldSpec, array: pa.Array) -> np.ndarray | Ragged:
    if isinstance(array, pa.ListArray):
        values = _flat(spec, array.values)
        return Ragged(values=values, offsets=np.asarray(array.offsets).astype(np.int64))
    if isinstance(array, pa.FixedSizeBinaryArray):
        data = np.frombuffer(array.buffers()[1], spec.dtype)
        return data[array.offset : array.offset + len(array)]
    if spec.nullable:
        return array.fill_null(ABSENT_LABEL).to_numpy(zero_copy_only=False)
    return _flat(spec, array)


def _flat(spec: FieldSpec, array: pa.Array) -> np.ndarray:
    """Lists of fixed sizes as an array [N, *inner shape], a view; booleans are Arrow's bits."""
    num_rows = len(array)
    while isinstance(array, pa.FixedSizeListArray):
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=spec.dtype != "bool")
    return values.reshape(num_rows, *spec.inner_shape)
