"""Language-model fields through schema, store, writer, reader and verify."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec, ReducedHidden
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.sampled import DistinctCodec, ReducedDistinct, SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import (
    Fields,
    FieldSpec,
    Ragged,
    Schema,
    bytes_per_position,
    check_fields,
    classification_schema,
    language_model_schema,
)
from teacher_cache.cache.stores.arrow import ArrowShard, encode
from teacher_cache.cache.verify import verify
from teacher_cache.cache.writer import CacheWriter
from tests.reference_codecs import realistic_logits, reduce_dense, reduce_sampled, reduce_topk
from tests.small_caches import make_manifest, make_plans, write_teacher_files

NUM_IDS = 40
CODECS: dict[str, Codec] = {
    "topk": TopKCodec(support_size=NUM_IDS, top_k=6),
    "topk of many ids": TopKCodec(support_size=151_936, top_k=6),
    "topk exact": TopKCodec(support_size=300_000, top_k=5, is_exact=True),
    "nucleus": TopKCodec(support_size=NUM_IDS, top_k=20, top_p=0.7),
    "nucleus of many ids": TopKCodec(support_size=151_936, top_k=20, top_p=0.7),
    "sampled": SampledCodec(support_size=NUM_IDS, num_draws=9),
    "sampled of many ids": SampledCodec(support_size=151_936, num_draws=9),
    "distinct": DistinctCodec(support_size=NUM_IDS, num_ids=9),
    "distinct of many ids": DistinctCodec(support_size=151_936, num_ids=9),
    "hidden": HiddenCodec(support_size=NUM_IDS, width=5),
    "dense": DenseCodec(support_size=NUM_IDS),
}
LENGTHS = (4, 0, 1, 7)  # of the samples of a shard, over and over


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]


def stored_sample(codec: Codec, num: int, seed: int) -> dict[str, np.ndarray]:
    """A codec's fields of one sample of `num` positions."""
    logits = realistic_logits(max(num, 1), NUM_IDS, seed=seed)
    reduced: Any
    if isinstance(codec, TopKCodec):
        reduced = reduce_topk(
            logits, top_k=codec.top_k, temperatures=codec.temperatures, top_p=codec.top_p
        )
    elif isinstance(codec, SampledCodec):
        draws = np.random.default_rng(seed).integers(NUM_IDS, size=(len(logits), 9))
        reduced = reduce_sampled(
            logits, draws, temperatures=codec.temperatures, draw_temperature=1.0
        )
    elif isinstance(codec, DistinctCodec):
        found = reduce_topk(logits, top_k=9, temperatures=codec.temperatures)
        rng = np.random.default_rng(seed)
        reduced = ReducedDistinct(
            ids=found.ids, below_max=found.below_max, tail_r=found.tail_r,
            num_heads=rng.integers(1, 10, len(logits)), rounding=rng.random((len(logits), 9)),
            top1_log_prob=found.top1_log_prob, next_log_prob=found.next_log_prob,
        )  # fmt: skip
    else:
        reduced = reduce_dense(logits)
        if isinstance(codec, HiddenCodec):
            always = (reduced.top1_log_prob, reduced.next_log_prob)
            reduced = ReducedHidden(
                hidden=logits[:, :5], top1_log_prob=always[0], next_log_prob=always[1]
            )
    return codec.encode(reduced[0:num])  # pyright: ignore[reportArgumentType]


def schema_of(codec: Codec) -> Schema:
    return language_model_schema(codec.fields, is_packed=True, has_offsets=True)


def make_fields(codec: Codec, samples: range) -> Fields:
    rows: list[dict[str, np.ndarray]] = []
    for sample in samples:
        num, rng = LENGTHS[sample % len(LENGTHS)], np.random.default_rng(sample)
        rows.append({
            "input_ids": rng.integers(2**32, size=num, dtype=np.uint32),
            "segment": np.sort(rng.integers(3, size=num)).astype(np.uint16),
            "loss_mask": rng.integers(2, size=num).astype(bool),
            "offsets": np.arange(num + 1, dtype=np.uint32) * 3,
            **stored_sample(codec, num, sample),
        })  # fmt: skip
    ids = b"".join(b"%016d" % sample for sample in samples)
    return {"sample_id": np.frombuffer(ids, "V16")} | {
        spec.name: Ragged.from_arrays(
            [row[spec.name] for row in rows], spec.dtype, spec.inner_shape
        )
        for spec in schema_of(codec)
        if spec.is_ragged
    }


def test_schema_of_a_language_model() -> None:
    found = [(one.name, one.dtype, one.shape) for one in schema_of(CODECS["nucleus of many ids"])]
    assert found == [
        ("sample_id", "V16", ()), ("input_ids", "uint32", ("S",)), ("segment", "uint16", ("S",)),
        ("loss_mask", "bool", ("S",)), ("offsets", "uint32", ("S+1",)),
        ("topk_sizes", "uint16", ("S",)), ("topk_ids", "uint16", ("sum(topk_sizes)",)),
        ("topk_ids_high", "uint8", ("sum(topk_sizes)/4",)),
        ("topk_values", "uint8", ("sum(topk_sizes)",)), ("topk_range", "float16", ("S",)),
        ("tail_r", "float16", ("S", 5)), ("tail_m", "float16", ("S", 5)),
        ("top1_log_prob", "float16", ("S",)), ("next_log_prob", "float16", ("S",)),
    ]  # fmt: skip
    plain = language_model_schema(CODECS["topk"].fields)
    assert [spec.name for spec in plain][:4] == ["sample_id", "input_ids", "loss_mask", "topk_ids"]
    assert plain[3].shape == ("S", 6)
    assert bytes_per_position(plain) == 4 + 1 + CODECS["topk"].bytes_per_token()


def test_specs_survive_json(codec: Codec) -> None:
    for spec in schema_of(codec):
        assert FieldSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_store_gives_back_every_bit_as_views(tmp_path: Path, codec: Codec) -> None:
    schema, fields = schema_of(codec), make_fields(codec, range(70))
    assert check_fields(schema, fields) == 70
    data, batches = encode(schema, fields)
    (tmp_path / "shard").write_bytes(data)
    shard = ArrowShard(tmp_path / "shard", schema, batches, len(data))
    assert len(batches) == 2
    assert shard.lengths().tolist() == [LENGTHS[idx % 4] for idx in range(70)]
    for idx in range(70):
        sample = shard.sample(idx)
        for spec in schema:
            wanted = fields[spec.name][idx]
            assert sample[spec.name].dtype == np.dtype(spec.dtype)
            assert sample[spec.name].shape == wanted.shape
            assert sample[spec.name].tobytes() == wanted.tobytes()
            is_view = not sample[spec.name].flags.owndata and not sample[spec.name].flags.writeable
            assert is_view or spec.dtype == "bool" or not spec.is_ragged
        assert all(
            len(one) == LENGTHS[idx % 4]
            for one in codec.expand(
                {spec.name: sample[spec.name] for spec in codec.fields}
            ).values()
        )


def test_a_shard_without_samples(tmp_path: Path, codec: Codec) -> None:
    data, batches = encode(schema_of(codec), make_fields(codec, range(0)))
    (tmp_path / "shard").write_bytes(data)
    assert len(ArrowShard(tmp_path / "shard", schema_of(codec), batches, len(data))) == 0


def test_through_writer_and_reader_with_a_bad_byte_found(tmp_path: Path, codec: Codec) -> None:
    plans = make_plans(10)
    settings = {"codec": codec.settings}
    manifest = replace(make_manifest(plans, settings), schema=schema_of(codec))
    with CacheWriter(tmp_path, manifest, plans, overwrite=False) as to:
        for split, shard_idx in to.begin(write_teacher_files):
            fields = make_fields(codec, range(*plans[split].documents(shard_idx)))
            to.commit(split, shard_idx, fields, num_truncated=0, environment={})
        to.finish()
    assert verify(tmp_path).problems == ()
    reader, expected = CacheReader(tmp_path), make_fields(codec, range(10))
    assert codec_from(read_manifest(tmp_path).settings["codec"]) == codec
    assert reader.manifest.schema == schema_of(codec)
    again = reader.samples([9, 3, 1])
    for spec in reader.manifest.schema:
        for place, idx in enumerate((9, 3, 1)):
            assert again[spec.name][place].tobytes() == expected[spec.name][idx].tobytes()
    path = tmp_path / "labeled/000/000001.arrow"
    data = bytearray(path.read_bytes())
    last = reader.sidecars[1].batches[0]
    data[last.offset + last.num_bytes - 9] ^= 4  # in or about the last field
    path.write_bytes(data)
    (problem,) = verify(tmp_path).problems
    assert "000001.arrow differs from its SHA-256" in problem
    with pytest.raises(BadShardError, match=r"record batch 0 .* differs from its checksum"):
        CacheReader(tmp_path).sample(5)


def _resized(column: np.ndarray | Ragged, add: int) -> Ragged:
    """A ragged column whose first sample takes `add` rows from the next."""
    assert isinstance(column, Ragged)
    offsets = column.offsets.copy()
    offsets[1] += add
    return Ragged(values=column.values, offsets=offsets)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss_mask", r"'loss_mask' of sample 0 has length 3; its shape \('S',\) asks for 4"),
        ("offsets", r"'offsets' of sample 0 has length 4; .* asks for 5, .* has 4 positions"),
        ("topk_ids", r"'topk_ids' of sample 0 .*sum\(topk_sizes\)"),
        ("topk_ids_high", r"'topk_ids_high' of sample 0 .*sum\(topk_sizes\)/4"),
        ("tail_r", r"'tail_r' of sample 0 has length 3; its shape \('S', 5\) asks for 4"),
    ],
)
def test_refuses_lengths_that_contradict_the_positions(name: str, words: str) -> None:
    codec = CODECS["nucleus of many ids"]
    fields = make_fields(codec, range(6))
    check_fields(schema_of(codec), fields)
    with pytest.raises(UserError, match=words):
        check_fields(schema_of(codec), {**fields, name: _resized(fields[name], -1)})


def test_refuses_another_width() -> None:
    codec = CODECS["topk"]
    fields = make_fields(codec, range(4))
    wrong = Ragged.from_arrays([np.zeros((n, 7), np.uint16) for n in LENGTHS], "uint16", (7,))
    with pytest.raises(UserError, match=r"shape \(7,\) a position.*uint16 of shape \(6,\)"):
        check_fields(schema_of(codec), {**fields, "topk_ids": wrong})


def test_a_classifiers_specs_are_what_they_were() -> None:
    """Byte for byte in manifests: an older cache stays readable, a newer one by older readers."""
    found = [spec.to_json() for spec in classification_schema(2, pooled_width=3)]
    assert json.dumps(found[1]) == (
        '{"name": "input_ids", "dtype": "uint32", "shape": ["S"], "nullable": false}'
    )
    assert [one["shape"] for one in found] == [[], ["S"], [], [2], [3]]
