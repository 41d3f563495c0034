"""What a student learns does not depend on how the shards lie on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher, convert, train_student
from teacher_cache.stages.codecs.config import ConvertConfig
from tests.command_line import done, refused
from tests.tiny_language_models import tiny_teacher, write_cache
from tests.tiny_runs import (
    cache_reviews,
    result_files,
    reviews_config,
    student_config,
)

pytestmark = pytest.mark.usefixtures("tokenizers_read_once")

TEXTS = [
    f"{person} had been {feeling} by the {thing}, and said so."
    for person in ("Emma", "Harriet")
    for feeling, thing in (("vexed", "rain"), ("charmed", "ball"), ("tired", "visit"))
]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def caches(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path
) -> dict[str, Path]:
    """The same reviews by the same teacher, in every format; only to be read."""
    folder = tmp_path_factory.mktemp("caches")
    return {
        store: cache_reviews(
            folder / store, tiny_bert, acl_imdb, format=store, hidden="pooled", shard_documents=50
        )
        for store in ("arrow", "zarr")
    }


def test_stage_one_writes_equal_fields_in_both(caches: dict[str, Path]) -> None:
    manifests = {store: read_manifest(cache) for store, cache in caches.items()}
    assert {store: one.store for store, one in manifests.items()} == {s: s for s in caches}
    assert manifests["arrow"].fingerprint == manifests["zarr"].fingerprint
    assert "zarr" in manifests["zarr"].versions and "zarr" not in manifests["arrow"].versions
    assert verify(caches["zarr"]).problems == ()
    for split in manifests["arrow"].splits:
        arrow, zarr = (CacheReader(cache, split) for cache in caches.values())
        assert len(arrow) == len(zarr) > 0
        for sample_idx in range(len(arrow)):
            one, other = arrow.sample(sample_idx), zarr.sample(sample_idx)
            assert one.keys() == other.keys()
            for name in one:
                assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes()


def test_a_classifier_learns_the_same_bits(caches: dict[str, Path], tmp_path: Path) -> None:
    files = {}
    for store, cache in caches.items():
        run = train_student.run(student_config(cache, tmp_path / store, unlabeled_alpha=0.3)).run
        files[store] = result_files(run)
    assert files["arrow"][WEIGHTS] == files["zarr"][WEIGHTS]


def test_a_language_model_learns_the_same_bits(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    num_ids = len(gpt2_tokenizer)
    codec = TopKCodec(support_size=num_ids, top_k=4)
    cache = write_cache(tmp_path / "lm", codec, gpt2_tokenizer, TEXTS, tiny_teacher(num_ids))
    convert.run(
        ConvertConfig.of(cache=cache, out=tmp_path / "lm-zarr", format="zarr", device="cpu")
    )
    files = []
    for name in ("lm", "lm-zarr"):
        config = student_config(
            tmp_path / name, tmp_path / f"{name}-run", batch_size=2, eval_fraction=0.4, max_steps=3
        )
        files.append(result_files(train_student.run(config).run))
    assert files[0][WEIGHTS] == files[1][WEIGHTS]


def test_inspect_and_verify_say_the_format(caches: dict[str, Path]) -> None:
    found = {store: done("inspect", cache) for store, cache in caches.items()}
    for store, printed in found.items():
        row = next(line for line in printed.splitlines() if line.split()[1:2] == ["format"])
        assert store in row
    # But for names, sizes and format, both hold and show the same.
    shown = [printed[printed.index("fields of a sample") :] for printed in found.values()]
    assert shown[0] == shown[1]
    assert "is sound" in done("verify", caches["zarr"])


def test_the_default_folders_differ_and_the_other_format_is_refused(
    caches: dict[str, Path],
    tiny_bert: Path,
    acl_imdb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = reviews_config(caches["arrow"], tiny_bert, acl_imdb, shard_documents=50)
    short = read_manifest(caches["arrow"]).fingerprint[:8]
    for store, suffix in (("arrow", ""), ("zarr", "-zarr")):
        changed = config.model_copy(update={"out": None, "format": store, "hidden": "pooled"})
        assert cache_teacher.run(changed).cache == Path(f"caches/tiny-{short}{suffix}")
    command = ("cache-teacher", "--data", acl_imdb, "--teacher", tiny_bert, "--format", "arrow")
    options = ("--out", caches["zarr"], "--hidden", "pooled", "--shard-documents", "50")
    words = "format is 'zarr' there and 'arrow' in this command"
    refused(*command, *options, "--max-length", "24", "--device", "cpu", saying=words)
