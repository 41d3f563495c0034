from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import (
    SQUARE,
    TRIANGLE,
    TRIANGLES,
    Fields,
    FieldSpec,
    Ragged,
    bytes_per_position,
    check_fields,
    classification_schema,
    fixed_bytes,
    width_of_pooled,
)
from tests.small_caches import SCHEMA, make_fields


def test_classification_holds_ids_label_and_exact_logits() -> None:
    found = [(one.name, one.dtype, one.shape, one.nullable) for one in classification_schema(2)]
    assert found == [
        ("sample_id", "V16", (), False),
        ("input_ids", "uint32", ("S",), False),
        ("label", "int32", (), True),
        ("class_logits", "float32", (2,), False),
    ]


def test_pooled_states_are_in_half_precision() -> None:
    *plain, pooled = classification_schema(2, pooled_width=8)
    assert tuple(plain) == classification_schema(2)
    assert pooled == FieldSpec(name="pooled", dtype="float16", shape=(8,))
    assert width_of_pooled((*plain, pooled)) == 8
    assert width_of_pooled(tuple(plain)) is None
    # Id, label, two logits; then eight states.
    assert fixed_bytes(tuple(plain)) == 16 + 4 + 2 * 4
    assert fixed_bytes((*plain, pooled)) == 16 + 4 + 2 * 4 + 8 * 2


def test_specs_survive_json() -> None:
    assert tuple(FieldSpec.from_json(one.to_json()) for one in SCHEMA) == SCHEMA


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=8))
def test_ragged_gives_back_each_array(lists: list[list[int]]) -> None:
    ragged = Ragged.from_arrays([np.array(one, np.uint32) for one in lists], "uint32")
    assert len(ragged) == len(lists)
    assert [ragged[idx].tolist() for idx in range(len(lists))] == lists
    assert (ragged.values.dtype, ragged.offsets.dtype) == (np.uint32, np.int64)


def test_counts_samples() -> None:
    assert check_fields(SCHEMA, make_fields("labeled", range(5))) == 5
    assert check_fields(SCHEMA, make_fields("labeled", range(0))) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": None}, r"the fields are \['class_logits', 'input_ids', 'sample_id'\]"),
        ({"extra": np.zeros(5)}, "the fields are .*'extra'.*the schema asks for"),
        ({"label": np.zeros(5, np.int64)}, "field 'label' is int64 .* asks for int32"),
        ({"label": np.zeros(4, np.int32)}, "field 'label' has 4 samples.*expected 5"),
        ({"class_logits": np.zeros((5, 2), np.float32)}, r"of shape \(2,\) a sample.*\(3,\)"),
        ({"input_ids": np.zeros(5, np.uint32)}, "ragged: False; expected 5, ragged: True"),
        ({"input_ids": Ragged.from_arrays([], "uint32")}, "'input_ids' has 0 samples"),
        ({"input_ids": Ragged.from_arrays([np.zeros(1)] * 5, "float64")}, "is float64"),
    ],
)
def test_refuses_fields_that_do_not_fit(change: Fields, words: str) -> None:
    fields = {**make_fields("labeled", range(5)), **change}
    fields = {name: column for name, column in fields.items() if column is not None}
    with pytest.raises(UserError, match=words):
        check_fields(SCHEMA, fields)


@pytest.mark.parametrize(
    ("shape", "segments", "wanted"),
    [
        (SQUARE, None, [9, 16]),
        (TRIANGLE, None, [6, 10]),
        (TRIANGLES, [[0, 0, 1], [0, 1, 1, 1]], [4, 7]),
    ],
)
def test_maps_are_as_long_as_their_shape_says(
    shape: str, segments: list[list[int]] | None, wanted: list[int]
) -> None:
    ragged = {
        "input_ids": ([np.zeros(n, np.uint32) for n in (3, 4)], "uint32"),
        "attention_0": ([np.zeros((n, 2), np.uint8) for n in wanted], "uint8"),
    }
    if segments is not None:
        ragged["segment"] = ([np.array(one, np.uint16) for one in segments], "uint16")
    schema = (
        FieldSpec(name="sample_id", dtype="V16"),
        FieldSpec(name="input_ids", dtype="uint32", shape=("S",)),
        *((FieldSpec(name="segment", dtype="uint16", shape=("S",)),) if segments else ()),
        FieldSpec(name="attention_0", dtype="uint8", shape=(shape, 2)),
    )
    assert [spec.is_map for spec in schema] == [*(False for _ in schema[1:]), True]
    assert bytes_per_position(schema) == (6 if segments else 4)  # maps have no size a position
    fields: Fields = {"sample_id": np.zeros(2, "V16")} | {
        name: Ragged.from_arrays(arrays, dtype, (2,) if name == "attention_0" else ())
        for name, (arrays, dtype) in ragged.items()
    }
    assert check_fields(schema, fields) == 2
    longer = [np.zeros((n + 1, 2), np.uint8) for n in wanted]
    fields["attention_0"] = Ragged.from_arrays(longer, "uint8", (2,))
    with pytest.raises(UserError, match=f"sample 0 has length {wanted[0] + 1}; .* {wanted[0]}, "):
        check_fields(schema, fields)
