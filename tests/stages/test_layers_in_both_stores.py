"""Maps and states in either store, damaged and repaired, converted, and learned from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher, convert, train_student
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from tests.small_caches import contents
from tests.tiny_models import write_tiny_bert, write_tiny_language_model
from tests.tiny_runs import (
    cache_language,
    result_files,
    reviews_config,
    student_config,
)

pytestmark = pytest.mark.usefixtures("tokenizers_read_once")

ASKED: dict[str, Any] = {
    "attention": "mean",
    "attention_layers": "all",
    "hidden": "pooled,0,1",
    "shard_documents": 50,
}
MATCHED: dict[str, Any] = {"attention_weight": 0.7, "hidden_weight": 0.4, "num_layers": 2}
LAYERS = ("attention_0", "attention_1", "hidden_0", "hidden_1")
BAD_SHARD = ("labeled", 1)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def texts(acl_imdb: Path) -> list[str]:
    return [path.read_text() for path in sorted(acl_imdb.glob("train/*/*.txt"))]


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory,
    bert_tokenizer: PreTrainedTokenizerBase,
    acl_imdb: Path,
    texts: list[str],
) -> Make:
    """Stage one of a tiny BERT with 300 ids, into a folder and a format; runs again, too."""
    assert isinstance(bert_tokenizer, PreTrainedTokenizerFast)
    tokenizer = bert_tokenizer.train_new_from_iterator(texts, 300)
    teacher = write_tiny_bert(tmp_path_factory.mktemp("teacher"), tokenizer)

    def run(folder: Path, store: str, *, num_shards_run: int) -> Path:
        config = reviews_config(folder, teacher, acl_imdb, format=store, **ASKED)
        result = cache_teacher.run(config)
        assert result.num_shards_run == num_shards_run
        return result.cache

    return run


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, make: Make) -> dict[str, Path]:
    """The same maps and states in every format; only to be read."""
    folder = tmp_path_factory.mktemp("caches")
    return {store: make(folder / store, store, num_shards_run=5) for store in ("arrow", "zarr")}


def assert_equal_fields(one: Path, other: Path, names: tuple[str, ...]) -> None:
    for split in read_manifest(one).splits:
        ours, theirs = CacheReader(one, split), CacheReader(other, split)
        assert len(ours) == len(theirs) > 0
        for idx in range(len(ours)):
            mine, other_sample = ours.sample(idx), theirs.sample(idx)
            for name in names:
                assert mine[name].shape == other_sample[name].shape
                assert mine[name].tobytes() == other_sample[name].tobytes(), (split, idx, name)


def test_a_student_that_matches_them_learns_the_same_bits(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    assert_equal_fields(caches["arrow"], caches["zarr"], LAYERS)
    files: dict[str, dict[str, bytes]] = {}
    for store, cache in caches.items():
        config = student_config(cache, tmp_path / store, unlabeled_alpha=0.3, **MATCHED)
        files[store] = result_files(train_student.run(config).run)
    weights = "model.safetensors"
    assert files["arrow"][weights] == files["zarr"][weights]
    plain = student_config(
        caches["zarr"], tmp_path / "plain", unlabeled_alpha=0.3, num_layers=MATCHED["num_layers"]
    )
    assert result_files(train_student.run(plain).run)[weights] != files["zarr"][weights]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _flip_a_code(shard: Path, code: bytes) -> None:
    """One bit inside a map, wherever in the file it lies."""
    data = bytearray(shard.read_bytes())
    place = data.find(code)
    assert place >= 0 and data.find(code, place + 1) < 0, "the map stands there once"
    data[place + len(code) // 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", ["arrow, a bit", "zarr, a bit", "zarr, no chunk"])
def test_damage_to_a_map_is_named_and_its_shard_alone_is_made_again(
    damage: str, caches: dict[str, Path], make: Make, tmp_path: Path
) -> None:
    store, what = damage.split(", ")
    cache = tmp_path / "cache"
    shutil.copytree(caches[store], cache)
    whole = contents(cache)
    split, shard_idx = BAD_SHARD
    shard = cache / f"{split}/000/{shard_idx:06d}.{store}"
    if store == "arrow":
        sample = CacheReader(caches[store], split).sample(50)  # the first of the second shard
        _flip_a_code(shard, sample["attention_1"].tobytes())
    elif what == "a bit":
        _flip(shard / "attention_1" / "c" / "0")
    else:
        (shard / "attention_1" / "c" / "0").unlink()

    (problem,) = verify(cache).problems
    assert f"000/{shard_idx:06d}" in problem
    assert store == "arrow" or "attention_1" in problem
    with pytest.raises(BadShardError, match=f"{shard_idx:06d}"):
        reader = CacheReader(cache, split)
        for idx in range(len(reader)):
            reader.sample(idx)
    make(cache, store, num_shards_run=1)
    assert contents(cache) == whole


def test_another_format_keeps_them(caches: dict[str, Path], tmp_path: Path) -> None:
    pairs: tuple[tuple[str, Literal["arrow", "zarr"]], ...] = (("arrow", "zarr"), ("zarr", "arrow"))
    for source, target in pairs:
        out = tmp_path / target
        convert.run(ConvertConfig.of(cache=caches[source], out=out, format=target, device="cpu"))
        assert_equal_fields(caches[source], out, LAYERS)
        old, new = read_manifest(caches[source]), read_manifest(out)
        assert new.fingerprint == old.fingerprint
        assert new.settings["attention"] == old.settings["attention"]
        assert new.about["attention"] == old.about["attention"]
        assert verify(out).problems == ()


def test_another_codec_keeps_them(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase, acl_imdb: Path, texts: list[str]
) -> None:
    assert isinstance(gpt2_tokenizer, PreTrainedTokenizerFast)
    tokenizer = gpt2_tokenizer.train_new_from_iterator(texts, 300)
    teacher = write_tiny_language_model(tmp_path / "teacher", tokenizer)
    prose = tmp_path / "prose.txt"  # short lines, several of which make a sample
    prose.write_text("".join(f"{' '.join(text.split()[:4])}\n" for text in texts[:20]))
    asked: dict[str, Any] = {"codec": "dense", "top_k": None, "attention": "full", "hidden": "0"}
    asked |= {"labeled": CorpusConfig(source=str(prose), labeled=False), "unlabeled": None}
    cache = cache_language(tmp_path / "dense", teacher, acl_imdb, max_length=48, **asked)
    out = tmp_path / "topk"
    convert.run(
        ConvertConfig.of(
            cache=cache, out=out, codec="topk", top_k=4, temperatures=(1.0, 2.0), device="cpu"
        )
    )
    names = [spec.name for spec in read_manifest(out).schema]
    assert "topk_ids" in names and "dense_logits" not in names
    kept = tuple(name for name in names if name.startswith(("attention_", "hidden_")))
    assert kept == ("attention_1", "hidden_0")
    assert_equal_fields(cache, out, kept)
    assert read_manifest(out).settings["attention"] == read_manifest(cache).settings["attention"]
    assert verify(out).problems == ()
    reader = CacheReader(out)
    assert max(int(np.max(reader.sample(idx)["segment"])) for idx in range(len(reader))) > 0
