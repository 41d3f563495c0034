"""The fields of a sample: names, dtypes, shapes, and how a shard's columns hold them in memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from teacher_cache.cache.errors import UserError

FORMAT = "teacher-cache"
FORMAT_VERSION = 3
"""The newest that this release reads; a cache's own is the oldest that knows all it uses."""
AT_COUNTED_VERSION = 3
"""The oldest that knows codecs' fields of the positions that count alone."""

SAMPLE_ID_BYTES = 16
ABSENT_LABEL = -1
"""Stands for a class that the cache does not have, where its reader gives one."""
NO_LABEL = -100
"""Stands for the class or the next token where there is none, as in torch and transformers."""
POOLED = "pooled"
TOKEN_TYPES = "token_types"
"""Of pairs, which text each token is of, as the teacher was told; a student is not."""
TOP1_LOG_PROB = "top1_log_prob"
NEXT_LOG_PROB = "next_log_prob"
CONTINUES = "continues"
"""Whether a sample's first piece goes on with a document that began in the sample before."""

SQUARE = "S*S"
TRIANGLE = "S*(S+1)/2"
TRIANGLES = "sum(n*(n+1)/2)"
COUNTED = "sum(loss_mask)"

Dimension = int | str
"""A number, or the first dimension of a ragged field: `S`, positions; `S+1`, their borders;
`sum(NAME)`, one entry for each that the sample's field NAME counts at its positions (a head of
differing sizes, end to end; with `loss_mask` one entry for each position that counts);
`sum(NAME)/4`, the same four to a byte, the last byte padded; of maps
between positions `S*S`, all pairs row by row; `S*(S+1)/2`, those of the lower triangle;
`sum(n*(n+1)/2)`, those of the triangle of each of the sample's segments, n positions long."""


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One field of a sample.

    Attributes:
        name: as in the store, the reader's batch and the collator's.
        dtype: numpy dtype; `V16` stands for 16 raw bytes.
        shape: of one sample; the first dimension may depend on it (`Dimension`).
        nullable: whether a sample may lack it (a label); -1 in memory, null on disk.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...] = ()
    nullable: bool = False

    @property
    def is_ragged(self) -> bool:
        """Whether the sample's length decides the shape."""
        return bool(self.shape) and isinstance(self.shape[0], str)

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """What stands behind the ragged dimension, or the whole shape where there is none."""
        return tuple(int(size) for size in (self.shape[1:] if self.is_ragged else self.shape))

    @property
    def is_map(self) -> bool:
        """Whether it grows with the square of the sample's length."""
        return self.is_ragged and self.shape[0] in (SQUARE, TRIANGLE, TRIANGLES)

    @property
    def counted_by(self) -> str | None:
        """The field that counts this one's entries at each position; None where none does."""
        found = re.match(r"sum\((\w+)\)", str(self.shape[0])) if self.is_ragged else None
        return found.group(1) if found else None

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "nullable": self.nullable,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FieldSpec:
        """Read back what `to_json` wrote."""
        return cls(
            name=value["name"],
            dtype=value["dtype"],
            shape=tuple(value["shape"]),
            nullable=value["nullable"],
        )


Schema = tuple[FieldSpec, ...]


CLASS_LABEL = FieldSpec(name="label", dtype="int32", nullable=True)
"""One of several classes."""


def classification_schema(
    num_classes: int,
    *,
    label: FieldSpec = CLASS_LABEL,
    has_token_types: bool = False,
    pooled_width: int | None = None,
    layer_fields: Schema = (),
) -> Schema:
    """Fields of a text-classification cache: ids, label, the teacher's exact logits (float32).

    Args:
        num_classes: C.
        label: how the kind of the teacher's head stores one.
        has_token_types: the teacher is told which text of a pair a token is of.
        pooled_width: D of the teacher's pooled states (float16); None where they are not cached.
        layer_fields: maps and states of the teacher's layers.
    """
    token_types = FieldSpec(name=TOKEN_TYPES, dtype="uint8", shape=("S",))
    fields = (
        FieldSpec(name="sample_id", dtype=f"V{SAMPLE_ID_BYTES}"),
        FieldSpec(name="input_ids", dtype="uint32", shape=("S",)),
        *((token_types,) if has_token_types else ()),
        label,
        FieldSpec(name="class_logits", dtype="float32", shape=(num_classes,)),
    )
    if pooled_width is not None:
        fields = (*fields, FieldSpec(name=POOLED, dtype="float16", shape=(pooled_width,)))
    return (*fields, *layer_fields)


def language_model_schema(
    codec_fields: Schema,
    *,
    is_packed: bool = False,
    has_continues: bool = False,
    has_offsets: bool = False,
    at_counted: bool = False,
    layer_fields: Schema = (),
) -> Schema:
    """Fields of a language-model cache: ids, what counts in a loss, and what its codec stores.

    Args:
        codec_fields: of `Codec.fields`.
        is_packed: samples hold several documents, numbered by `segment`.
        has_continues: samples say whether they go on with a document (`CONTINUES`).
        has_offsets: each token's borders in the bytes of its text are kept, for span alignment.
        at_counted: the codec's fields are of the positions that count alone, not of all.
        layer_fields: maps and states of the teacher's layers.
    """
    segment = FieldSpec(name="segment", dtype="uint16", shape=("S",))
    continues = FieldSpec(name=CONTINUES, dtype="bool")
    offsets = FieldSpec(name="offsets", dtype="uint32", shape=("S+1",))
    return (
        FieldSpec(name="sample_id", dtype=f"V{SAMPLE_ID_BYTES}"),
        FieldSpec(name="input_ids", dtype="uint32", shape=("S",)),
        *((segment,) if is_packed else ()),
        *((continues,) if has_continues else ()),
        FieldSpec(name="loss_mask", dtype="bool", shape=("S",)),
        *((offsets,) if has_offsets else ()),
        *(counted_fields(codec_fields) if at_counted else codec_fields),
        *layer_fields,
    )


def counted_fields(codec_fields: Schema) -> Schema:
    """Those of a codec with an entry for each position that counts, where all positions had one."""
    return tuple(
        replace(spec, shape=(COUNTED, *spec.shape[1:])) if spec.shape[0] == "S" else spec
        for spec in codec_fields
    )


def format_version(schema: Schema) -> int:
    """The oldest that knows all that a schema uses, whatever the store."""
    return AT_COUNTED_VERSION if any(COUNTED in spec.shape for spec in schema) else 1


def bytes_per_position(schema: Schema, entries: float = 0.0) -> float:
    """Bytes that one more position adds to a sample, maps between positions left out.

    Args:
        schema: of all of a sample's fields, or of a codec's.
        entries: the mean count of a position, where a field counts others' entries.
    """
    per_position = {"S": 1.0, "S+1": 1.0}
    total = 0.0
    for spec in schema:
        if spec.is_ragged and not spec.is_map:
            share = entries / 4 if str(spec.shape[0]).endswith("/4") else entries
            size = np.dtype(spec.dtype).itemsize * math.prod(spec.inner_shape)
            total += size * per_position.get(str(spec.shape[0]), share)
    return total


def fixed_bytes(schema: Schema) -> int:
    """Bytes of a sample's fields that are of one size in every sample."""
    return sum(
        np.dtype(spec.dtype).itemsize * math.prod(spec.inner_shape)
        for spec in schema
        if not spec.is_ragged
    )


def width_of_pooled(schema: Schema) -> int | None:
    """D of the teacher's pooled states; None where they are not cached."""
    for spec in schema:
        if spec.name == POOLED:
            return int(spec.shape[0])
    return None


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Arrays of differing lengths, end to end: sample i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray  # [total, ...]
    offsets: np.ndarray  # [N + 1] int64

    @classmethod
    def from_arrays(
        cls, arrays: list[np.ndarray], dtype: str, inner_shape: tuple[int, ...] = ()
    ) -> Ragged:
        """Join the samples' arrays, each [length, *inner_shape]."""
        lengths = [len(array) for array in arrays]
        empty = np.empty((0, *inner_shape), dtype)
        values = np.concatenate([*arrays, empty]).astype(dtype, copy=False)
        return cls(values=values, offsets=np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.offsets) - 1

    def __getitem__(self, sample_idx: int) -> np.ndarray:
        """One sample's values, a view."""
        return self.values[self.offsets[sample_idx] : self.offsets[sample_idx + 1]]


Fields = dict[str, np.ndarray | Ragged]


def joined_fields(schema: Schema, parts: list[Fields]) -> Fields:
    """The fields of consecutive samples as one."""
    joined: Fields = {}
    for spec in schema:
        columns = [part[spec.name] for part in parts]
        if spec.is_ragged:
            arrays = [_ragged(one).values for one in columns]
            ends = np.concatenate([np.diff(_ragged(one).offsets) for one in columns] or [[]])
            values = Ragged.from_arrays(arrays, spec.dtype, spec.inner_shape).values
            offsets = np.concatenate([[0], np.cumsum(ends)]).astype(np.int64)
            joined[spec.name] = Ragged(values=values, offsets=offsets)
        else:
            empty = np.empty((0, *spec.inner_shape), spec.dtype)
            joined[spec.name] = np.concatenate([empty, *(np.asarray(one) for one in columns)])
    return joined


def check_fields(schema: Schema, fields: Fields) -> int:
    """Check names, dtypes and shapes against the schema; return the number of samples.

    Raises:
        UserError: for a field that is missing, unknown, of another dtype, shape or length.
    """
    names = [spec.name for spec in schema]
    if sorted(names) != sorted(fields):
        raise UserError(f"the fields are {sorted(fields)}, the schema asks for {sorted(names)}")
    num_samples = len(fields["sample_id"])
    for spec in schema:
        column = fields[spec.name]
        array = column.values if isinstance(column, Ragged) else column
        if isinstance(column, Ragged) != spec.is_ragged or len(column) != num_samples:
            raise UserError(
                f"field {spec.name!r} has {len(column)} samples, ragged: "
                f"{isinstance(column, Ragged)}; expected {num_samples}, ragged: {spec.is_ragged}"
            )
        if array.dtype != np.dtype(spec.dtype) or array.shape[1:] != spec.inner_shape:
            each = "position" if spec.is_ragged else "sample"
            raise UserError(
                f"field {spec.name!r} is {array.dtype} of shape {array.shape[1:]} a {each}, the "
                f"schema asks for {spec.dtype} of shape {spec.inner_shape}"
            )
    for spec in schema:
        _check_lengths(spec, fields)
    return num_samples


def _check_lengths(spec: FieldSpec, fields: Fields) -> None:
    """Check that each sample has as many of a ragged field as its positions and counts say."""
    column = fields[spec.name]
    if not isinstance(column, Ragged):
        return
    positions = np.diff(_ragged(fields["input_ids"]).offsets)
    if spec.counted_by is not None:
        counts = _ragged(fields[spec.counted_by])
        before = np.concatenate([[0], np.cumsum(counts.values, dtype=np.int64)])
        wanted = np.diff(before[counts.offsets])
        if str(spec.shape[0]).endswith("/4"):
            wanted = -(-wanted // 4)
    elif spec.shape[0] == TRIANGLES:
        segments = _ragged(fields["segment"])
        wanted = np.array([_in_triangles(segments[i]) for i in range(len(segments))], np.int64)
    else:
        by_shape = {"S+1": positions + 1, SQUARE: positions**2}
        triangles = positions * (positions + 1) // 2
        wanted = (by_shape | {TRIANGLE: triangles}).get(str(spec.shape[0]), positions)
    found = np.diff(column.offsets)
    if not np.array_equal(found, wanted):
        first = int(np.argmax(found != wanted))
        raise UserError(
            f"field {spec.name!r} of sample {first} has length {found[first]}; its shape "
            f"{spec.shape} asks for {wanted[first]}, since the sample has {positions[first]} "
            "positions"
        )


def _in_triangles(segment: np.ndarray) -> int:
    """Pairs of positions of one segment, the second not behind the first; segments are runs."""
    lengths = np.bincount(segment).astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def _ragged(column: np.ndarray | Ragged) -> Ragged:
    assert isinstance(column, Ragged)  # the schema says so, and was checked
    return column
