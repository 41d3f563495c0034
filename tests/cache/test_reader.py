from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.cache import reader as reader_module
from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Fields, Ragged
from teacher_cache.cache.verify import verify
from tests.small_caches import NUM_CLASSES, make_fields, shard_file, write_cache

pytestmark = pytest.mark.usefixtures("store")

NUM_LABELED, NUM_UNLABELED = 210, 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, store: str) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, NUM_LABELED, NUM_UNLABELED)
    return folder


@pytest.fixture(scope="module")
def written() -> Fields:
    """All that the labelled split holds."""
    return make_fields("labeled", range(NUM_LABELED))


def _tokens(fields: Fields) -> list[list[int]]:
    column = fields["input_ids"]
    assert isinstance(column, Ragged)
    return [column[idx].tolist() for idx in range(len(column))]


def test_a_sample_is_what_was_written(cache: Path, written: Fields) -> None:
    reader = CacheReader(cache)
    assert len(reader) == len(written["label"])
    tokens = _tokens(written)
    for idx in np.random.default_rng(0).permutation(len(reader)).tolist():
        sample = reader.sample(idx)
        assert sample["sample_id"].tobytes() == written["sample_id"][idx].tobytes()
        assert sample["input_ids"].tolist() == tokens[idx]
        assert int(sample["label"]) == written["label"][idx]
        assert sample["class_logits"].tobytes() == written["class_logits"][idx].tobytes()


def test_samples_are_in_the_order_asked_for(cache: Path, written: Fields) -> None:
    wanted = [150, 3, 3, 0]
    found = CacheReader(cache).samples(wanted)
    assert _tokens(found) == [_tokens(written)[idx] for idx in wanted]
    for name in ("sample_id", "label", "class_logits"):
        column, expected = found[name], written[name]
        assert isinstance(column, np.ndarray) and isinstance(expected, np.ndarray)
        assert column.dtype == expected.dtype
        assert column.tobytes() == expected[wanted].tobytes()
    nothing = CacheReader(cache).samples([])
    assert np.asarray(nothing["class_logits"]).shape == (0, NUM_CLASSES)
    assert len(nothing["input_ids"]) == 0


def test_whole_columns(cache: Path, written: Fields) -> None:
    reader = CacheReader(cache)
    for name in ("label", "class_logits"):
        np.testing.assert_array_equal(reader.column(name), np.asarray(written[name]))
    assert reader.lengths().tolist() == [len(tokens) for tokens in _tokens(written)]
    ids = list(reader.sample_ids())
    assert ids == [one.tobytes() for one in np.asarray(written["sample_id"])]
    assert len(set(ids)) == len(ids)


def test_finds_samples_by_the_start_of_their_id(cache: Path) -> None:
    reader = CacheReader(cache)
    ids = [sample_id.hex() for sample_id in reader.sample_ids()]
    assert reader.find(ids[77]) == [77]
    assert reader.find(ids[77][:12].upper()) == [77]
    assert reader.find(ids[77][:1]) == [i for i, one in enumerate(ids) if one[0] == ids[77][0]]
    assert reader.find("not hex") == []


def test_unlabeled_samples_have_no_label(cache: Path) -> None:
    reader = CacheReader(cache, "unlabeled")
    assert len(reader) == len(make_fields("unlabeled", range(NUM_UNLABELED))["label"])
    assert set(reader.column("label").tolist()) == {-1}


@pytest.mark.parametrize("idx", [-1, 10**6])
def test_no_such_sample(cache: Path, idx: int) -> None:
    with pytest.raises(IndexError, match=f"sample {idx} of"):
        CacheReader(cache).sample(idx)


@pytest.mark.parametrize("num_documents", [22, 24, 26])
def test_a_shard_without_samples(tmp_path: Path, num_documents: int) -> None:
    write_cache(tmp_path, num_documents)
    reader = CacheReader(tmp_path)
    assert reader.sidecars[5].num_samples == 0
    written = make_fields("labeled", range(num_documents))
    assert _tokens(reader.samples(range(len(reader)))) == _tokens(written)
    assert verify(tmp_path).problems == ()


def test_few_open_shards_suffice_for_many(
    cache: Path, written: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 3)
    reader = CacheReader(cache)
    assert len(reader.sidecars) > 50
    kept = reader.sample(0)["class_logits"]
    order = np.random.default_rng(1).permutation(len(reader))
    found = reader.samples(order)
    np.testing.assert_array_equal(found["class_logits"], np.asarray(written["class_logits"])[order])
    assert len(reader._open) <= 3
    # A view outlives its shard's place among the open ones.
    np.testing.assert_array_equal(kept, np.asarray(written["class_logits"])[0])


def test_incomplete_is_refused_with_the_way_on(tmp_path: Path) -> None:
    def stop(split: str, shard_idx: int) -> None:
        if shard_idx == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, 20, before_shard=stop)
    with pytest.raises(UserError, match=r"is not complete: run the same .* resumes from the"):
        CacheReader(tmp_path)


def test_unknown_split_is_refused_with_the_nearest(cache: Path) -> None:
    with pytest.raises(UserError, match="has no split 'unlabelled': did you mean 'unlabeled'"):
        CacheReader(cache, "unlabelled")
    with pytest.raises(UserError, match="has no split 'x': choose from labeled, unlabeled"):
        CacheReader(cache, "x")


def test_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no cache"):
        CacheReader(tmp_path)


def test_damage_is_named_when_it_is_touched(tmp_path: Path) -> None:
    write_cache(tmp_path, 20)
    shard = shard_file(tmp_path, "labeled", 2)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    reader = CacheReader(tmp_path)
    reader.sample(0)
    bad = sum(one.num_samples for one in reader.sidecars[:2])
    with pytest.raises(BadShardError, match=r"000002.* differs from its checksum: run stage one"):
        reader.sample(bad)
    shard.write_bytes(data[:-1])
    with pytest.raises(BadShardError, match=r"000002.* has \d+ bytes, its sidecar says"):
        CacheReader(tmp_path).sample(bad)


def test_an_index_that_lacks_shards_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, 20)
    manifest = read_manifest(tmp_path)
    replace(manifest, index=()).write(tmp_path)
    with pytest.raises(BadShardError, match="lists 0 labeled shards in its index, its manifest 5"):
        CacheReader(tmp_path)


def test_needs_neither_torch_nor_transformers(cache: Path) -> None:
    script = """
import sys
for name in ("torch", "transformers", "datasets", "tokenizers"):
    sys.modules[name] = None  # importing it fails
from teacher_cache.cache.order import ShuffledBatches
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
reader = CacheReader(sys.argv[1])
batch = next(iter(ShuffledBatches(reader.lengths(), batch_size=4, seed=0)))
print(reader.samples(batch)["class_logits"].shape, verify(reader.cache).problems)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(cache)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"(4, {NUM_CLASSES}) ()"
