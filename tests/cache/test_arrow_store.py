from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.schema import (
    ABSENT_LABEL,
    Fields,
    FieldSpec,
    Ragged,
    classification_schema,
)
from teacher_cache.cache.stores.arrow import SAMPLES_PER_BATCH, ArrowShard, BatchRange, encode
from tests.small_caches import SCHEMA, make_fields

Encoded = tuple[bytes, list[BatchRange]]

_ANY_FLOAT = st.integers(0, 2**32 - 1)  # every bit pattern: NaNs with payloads, infinities, -0


def _write(path: Path, encoded: Encoded) -> ArrowShard:
    data, batches = encoded
    path.write_bytes(data)
    return ArrowShard(path, SCHEMA, batches, len(data))


def _bits(column: np.ndarray | Ragged) -> list[bytes]:
    return [column[idx].tobytes() for idx in range(len(column))]


def _all_bits(shard: ArrowShard) -> dict[str, list[bytes]]:
    batches = list(shard.batches())
    return {
        spec.name: [bits for one in batches for bits in _bits(one[spec.name])] for spec in SCHEMA
    }


@st.composite
def _columns(draw: st.DrawFn) -> tuple[Fields, int]:
    """Few distinct samples, repeated in a random order to fill several record batches."""
    num_classes = draw(st.integers(1, 4))
    pool = draw(
        st.lists(
            st.tuples(
                st.binary(min_size=16, max_size=16) | st.just(b"\0" * 16),
                st.lists(st.integers(0, 2**32 - 1), max_size=9),
                st.integers(ABSENT_LABEL, 2**31 - 1),
                st.lists(_ANY_FLOAT, min_size=num_classes, max_size=num_classes),
            ),
            min_size=1,
            max_size=5,
        )
    )
    num_samples = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 128, 150]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    samples = [pool[pick] for pick in rng.integers(len(pool), size=num_samples)]
    logits = np.array([one[3] for one in samples], np.uint32).reshape(-1, num_classes)
    return {
        "sample_id": np.frombuffer(b"".join(one[0] for one in samples), "V16"),
        "input_ids": Ragged.from_arrays([np.array(one[1], np.uint32) for one in samples], "uint32"),
        "label": np.array([one[2] for one in samples], np.int32),
        "class_logits": logits.view(np.float32),
    }, num_classes


@settings(max_examples=60)
@given(_columns())
def test_gives_back_every_bit(columns: tuple[Fields, int]) -> None:
    fields, num_classes = columns
    schema = classification_schema(num_classes)
    data, batches = encode(schema, fields)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.arrow"
        path.write_bytes(data)
        shard = ArrowShard(path, schema, batches, len(data))
        num_samples = len(fields["label"])
        assert len(shard) == num_samples
        assert [batch.num_samples for batch in batches] == [
            min(SAMPLES_PER_BATCH, num_samples - start)
            for start in range(0, num_samples, SAMPLES_PER_BATCH)
        ]
        wanted = {spec.name: _bits(fields[spec.name]) for spec in schema}
        for idx in range(num_samples):
            sample = shard.sample(idx)
            for spec in schema:
                assert sample[spec.name].tobytes() == wanted[spec.name][idx]
                dtype, dims = np.dtype(spec.dtype), len(spec.shape)
                assert (sample[spec.name].dtype, sample[spec.name].ndim) == (dtype, dims)
        tokens = fields["input_ids"]
        assert isinstance(tokens, Ragged)
        assert shard.lengths().tolist() == np.diff(tokens.offsets).tolist()


def test_the_file_is_plain_arrow(tmp_path: Path) -> None:
    fields = make_fields("labeled", range(100))
    data, _ = encode(SCHEMA, fields)
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    assert table["class_logits"].to_pylist() == np.asarray(fields["class_logits"]).tolist()
    tokens = [fields["input_ids"][idx].tolist() for idx in range(table.num_rows)]
    assert table["input_ids"].to_pylist() == tokens
    unlabeled, _ = encode(SCHEMA, make_fields("unlabeled", range(9)))
    labels = pa.ipc.open_file(pa.py_buffer(unlabeled)).read_all()["label"]
    assert labels.null_count == len(labels)


def test_equal_fields_have_equal_bytes() -> None:
    first, second = (encode(SCHEMA, make_fields("unlabeled", range(200))) for _ in range(2))
    assert first == second


def test_several_dimensions(tmp_path: Path) -> None:
    schema = (*SCHEMA, FieldSpec(name="hidden", dtype="float16", shape=(2, 3)))
    fields = make_fields("labeled", range(100))
    hidden = np.arange(len(fields["label"]) * 6, dtype=np.float16).reshape(-1, 2, 3)
    data, batches = encode(schema, {**fields, "hidden": hidden})
    (tmp_path / "a").write_bytes(data)
    shard = ArrowShard(tmp_path / "a", schema, batches, len(data))
    np.testing.assert_array_equal(shard.sample(66)["hidden"], hidden[66])


def test_a_shard_without_samples(tmp_path: Path) -> None:
    data, batches = encode(SCHEMA, make_fields("labeled", range(5, 6)))
    shard = _write(tmp_path / "empty.arrow", (data, batches))
    assert (len(shard), batches, list(shard.batches())) == (0, [], [])
    assert shard.lengths().tolist() == []


def test_refuses_fields_that_do_not_fit_the_schema() -> None:
    with pytest.raises(UserError, match="the fields are"):
        encode(SCHEMA, {})


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    return encode(SCHEMA, make_fields("labeled", range(170)))


def test_a_flipped_bit_within_a_batch_is_caught(tmp_path: Path, encoded: Encoded) -> None:
    """Everywhere in a batch: its metadata, which Arrow parses, and its padding too."""
    data, batches = encoded
    assert len(batches) == 3
    rng = np.random.default_rng(0)
    for batch_idx, extent in enumerate(batches):
        for position in sorted(rng.choice(extent.num_bytes, 150, replace=False)):
            changed = bytearray(data)
            changed[extent.offset + position] ^= 1 << int(rng.integers(8))
            shard = _write(tmp_path / "shard.arrow", (bytes(changed), batches))
            first = sum(batch.num_samples for batch in batches[:batch_idx])
            with pytest.raises(BadShardError, match=f"record batch {batch_idx} .* its checksum"):
                shard.sample(first)
            other = 0 if batch_idx else first + extent.num_samples
            shard.sample(other)  # what is not damaged can be read


def test_a_flipped_bit_outside_the_batches_changes_nothing(
    tmp_path: Path, encoded: Encoded
) -> None:
    """Header and footer have no checksum, so nothing that is read depends on them."""
    data, batches = encoded
    wanted = _all_bits(_write(tmp_path / "shard.arrow", encoded))
    outside = [
        *range(batches[0].offset),
        *range(batches[-1].offset + batches[-1].num_bytes, len(data)),
    ]
    rng = np.random.default_rng(0)
    for position in rng.choice(outside, 200, replace=False):
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        assert _all_bits(_write(tmp_path / "shard.arrow", (bytes(changed), batches))) == wanted


def test_lengths_of_a_damaged_batch_are_refused_or_read_in_bounds(
    tmp_path: Path, encoded: Encoded
) -> None:
    """They are read without a checksum: whatever Arrow cannot parse must be our error."""
    data, batches = encoded
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(batches[0].offset, batches[0].offset + 500):
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        try:
            _write(tmp_path / "shard.arrow", (bytes(changed), batches)).lengths()
        except BadShardError as error:
            assert "cannot be parsed" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("num_bytes", [0, 1, 2000, -1])
def test_a_truncated_shard_is_refused_when_opened(
    tmp_path: Path, encoded: Encoded, num_bytes: int
) -> None:
    data, batches = encoded
    path = tmp_path / "shard.arrow"
    path.write_bytes(data[:num_bytes])
    with pytest.raises(BadShardError) as caught:
        ArrowShard(path, SCHEMA, batches, len(data))
    found = len(data[:num_bytes])
    assert f"{path} has {found} bytes, its sidecar says {len(data)}" in str(caught.value)
    assert "rebuilds just this shard" in str(caught.value)


def test_a_missing_shard_is_refused_when_opened(tmp_path: Path, encoded: Encoded) -> None:
    with pytest.raises(BadShardError, match="has no bytes"):
        ArrowShard(tmp_path / "none.arrow", SCHEMA, encoded[1], len(encoded[0]))


def test_another_batchs_bytes_in_its_place_are_caught(tmp_path: Path, encoded: Encoded) -> None:
    data, batches = encoded
    swapped = [replace(batches[0], crc32c=batches[1].crc32c), *batches[1:]]
    shard = _write(tmp_path / "shard.arrow", (data, swapped))
    with pytest.raises(BadShardError, match="differs from its checksum"):
        list(shard.batches())


def test_more_entries_than_a_record_batch_can_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.cache.stores.arrow.MOST_ENTRIES", 1)
    fields = make_fields("labeled", range(5))
    with pytest.raises(UserError, match=r"input_ids has \d+ entries in 5 samples.*--shard-mb"):
        encode(SCHEMA, fields)
