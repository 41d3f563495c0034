"""The fields of a sample: names, dtypes, shapes, and how a shard's columns hold them in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from teacher_cache.cache.errors import UserError

FORMAT = "teacher-cache"
FORMAT_VERSION = 1

SAMPLE_ID_BYTES = 16
NO_LABEL = -1
POOLED = "pooled"

Dimension = int | Literal["S"]


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One field of a sample.

    Attributes:
        name: as in the store, the reader's batch and the collator's.
        dtype: numpy dtype; `V16` stands for 16 raw bytes.
        shape: of one sample; `S` is its number of positions.
        nullable: whether a sample may lack it (a label); -1 in memory, null on disk.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...] = ()
    nullable: bool = False

    @property
    def is_ragged(self) -> bool:
        """Whether the sample's length decides the shape."""
        return "S" in self.shape

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


def classification_schema(num_classes: int, *, pooled_width: int | None = None) -> Schema:
    """Fields of a text-classification cache: ids, label, the teacher's exact logits (float32).

    Args:
        num_classes: C.
        pooled_width: D of the teacher's pooled states (float16); None where they are not cached.
    """
    fields = (
        FieldSpec(name="sample_id", dtype=f"V{SAMPLE_ID_BYTES}"),
        FieldSpec(name="input_ids", dtype="uint32", shape=("S",)),
        FieldSpec(name="label", dtype="int32", nullable=True),
        FieldSpec(name="class_logits", dtype="float32", shape=(num_classes,)),
    )
    if pooled_width is None:
        return fields
    return (*fields, FieldSpec(name=POOLED, dtype="float16", shape=(pooled_width,)))


def fixed_bytes(schema: Schema) -> int:
    """Bytes of a sample's fields that are of one size in every sample."""
    return sum(
        np.dtype(spec.dtype).itemsize * math.prod(int(size) for size in spec.shape)
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

    values: np.ndarray  # [total]
    offsets: np.ndarray  # [N + 1] int64

    @classmethod
    def from_arrays(cls, arrays: list[np.ndarray], dtype: str) -> Ragged:
        """Join the samples' arrays."""
        lengths = [len(array) for array in arrays]
        values = np.concatenate([*arrays, np.empty(0, dtype)]).astype(dtype, copy=False)
        return cls(values=values, offsets=np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.offsets) - 1

    def __getitem__(self, sample_idx: int) -> np.ndarray:
        """One sample's values, a view."""
        return self.values[self.offsets[sample_idx] : self.offsets[sample_idx + 1]]


Fields = dict[str, np.ndarray | Ragged]


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
        shape = () if isinstance(column, Ragged) else column.shape[1:]
        if isinstance(column, Ragged) != spec.is_ragged or len(column) != num_samples:
            raise UserError(
                f"field {spec.name!r} has {len(column)} samples, ragged: "
                f"{isinstance(column, Ragged)}; expected {num_samples}, ragged: {spec.is_ragged}"
            )
        if array.dtype != np.dtype(spec.dtype) or (not spec.is_ragged and shape != spec.shape):
            raise UserError(
                f"field {spec.name!r} is {array.dtype} of shape {shape} a sample, the schema "
                f"asks for {spec.dtype} of shape {spec.shape}"
            )
    return num_samples
