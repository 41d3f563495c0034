"""A student's mixing matrices beside its teacher's maps: from the command line and by hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.pictures import NamedMap, both_maps
from teacher_cache.stages import train_student
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.evaluation.matched_attention import InsideOfRun
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.student.mixing_matrices import mixing_matrices
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import done, refused
from tests.tiny_models import write_tiny_bert, write_tiny_language_model
from tests.tiny_runs import cache_language, cache_reviews, student_config

pytestmark = pytest.mark.usefixtures("no_network")

ONE_STEP: dict[str, Any] = {"max_steps": 1, "eval_fraction": 0.0}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "mapped"
    asked: dict[str, Any] = {"attention": "full", "attention_layers": "all", "unlabeled": None}
    return cache_reviews(folder, tiny_bert, acl_imdb, **asked)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mapped: Path) -> Path:
    """A student of two layers, whose last one matches the teacher's first."""
    out = tmp_path_factory.mktemp("runs") / "matched"
    asked: dict[str, Any] = {"attention_weight": 0.5, "attention_layer_map": "1:0"}
    return train_student.run(student_config(mapped, out, num_layers=2, **asked, **ONE_STEP)).run


def first_id(cache: Path) -> str:
    return CacheReader(cache).sample(0)["sample_id"].tobytes().hex()


def by_hand(weights: np.ndarray) -> np.ndarray:
    """Shares of the lower triangle's rows; NaN above it."""
    shares = np.full(weights.shape, np.nan)
    for i, row in enumerate(weights):
        shares[i, : i + 1] = row[: i + 1] / row[: i + 1].sum()
    return shares


def test_both_are_at_the_students_positions(mapped: Path, run: Path) -> None:
    reader = CacheReader(mapped)
    sample = reader.sample(0)
    found = InsideOfRun.of(run, reader).matched_attention(sample)
    num = len(sample["input_ids"])
    order = [*range(1, num), 0]  # CLS goes last
    assert found.sources.tolist() == order and found.rows.tolist() == list(range(num))
    (one,) = found.layers
    assert one.pair == (1, 0)

    codec: Any = attention_from(reader.manifest.settings)
    teacher = codec.decode_sample(sample["attention_0"], [num]).mean(axis=0)
    np.testing.assert_allclose(one.teacher, by_hand(teacher[np.ix_(order, order)]), rtol=1e-5)

    model: Any = Classifier.of_run(run, DeviceConfig(device="cpu")).model
    ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
    with torch.no_grad():
        matrices = mixing_matrices(model(ids, output_mixers=True).mixers[1])[0]
    student = by_hand(matrices.abs().mean(0).numpy())
    np.testing.assert_allclose(one.student, student, rtol=1e-4, atol=1e-7)


def test_they_are_drawn(mapped: Path, run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.svg"
    asked = ("--sample", first_id(mapped), "--attention-image", picture, "--run", run)
    assert "drawn" in done("inspect", mapped, *asked)
    assert picture.read_bytes().count(b"axes_") >= 3  # two panels and the colours


def titles(maps: Sequence[NamedMap]) -> list[str]:
    return [one.title for one in maps]


def test_a_run_that_matched_nothing_is_compared_by_proportion(mapped: Path, tmp_path: Path) -> None:
    config = student_config(mapped, tmp_path / "run", num_layers=4, bidirectional=True, **ONE_STEP)
    reader = CacheReader(mapped)
    inside = InsideOfRun.of(train_student.run(config).run, reader)
    found = inside.matched_attention(reader.sample(1))
    tokens = [f"t{i}" for i in found.sources]
    assert titles(both_maps(found, tokens)) == [
        f"{side}, layer {layer}"
        for pair in ((1, 0), (2, 1), (3, 1))  # 0.5 and 1.5 go to even numbers
        for side, layer in zip(("teacher", "student"), reversed(pair), strict=True)
    ]
    for one in found.layers:  # it looks both ways
        assert np.isfinite(one.teacher).all() and np.isfinite(one.student).all()
        np.testing.assert_allclose(one.student.sum(axis=1), 1, rtol=1e-5)


def test_a_wide_mamba_1_has_as_many_channels_as_it_was_trained_with(
    mapped: Path, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"arch": "mamba", "d_model": 400, "expand": 2, "num_layers": 1}
    matched: dict[str, Any] = {"attention_weight": 0.5, "attention_channels": 790}
    where: dict[str, Any] = {"cache": mapped, "out": tmp_path / "run", "device": "cpu"}
    config = TrainStudentConfig.of(**where, **shape, **matched, **ONE_STEP, d_state=4, batch_size=8)
    inside = InsideOfRun.of(train_student.run(config).run, CacheReader(mapped))
    assert inside.layers.maps is not None and inside.layers.maps.num_channels == 790


def test_an_appended_token_looks_and_is_not_looked_at(
    tmp_path: Path, tiny_gpt2: Path, acl_imdb: Path
) -> None:
    """GPT-2 has no CLS; of a cache of pooled rows each layer has one row."""
    tokens: list[str] = []
    labeled = CorpusConfig(
        source=str(acl_imdb), split="train", max_samples=10, label_names=("neg", "pos")
    )
    for mode in ("mean", "cls"):
        asked: dict[str, Any] = {"attention": mode, "attention_layers": "all"}
        asked |= {"labeled": labeled, "unlabeled": None}
        cache = cache_reviews(tmp_path / mode, tiny_gpt2, acl_imdb, **asked)
        config = student_config(cache, tmp_path / f"{mode}-run", num_layers=2, **ONE_STEP)
        reader = CacheReader(cache)
        sample = reader.sample(0)
        found = InsideOfRun.of(train_student.run(config).run, reader).matched_attention(sample)
        num = len(sample["input_ids"])
        assert found.sources.tolist() == [*range(num), -1] and found.appended_id is not None
        tokens = [f"t{i}" for i in found.sources]
        for one in found.layers:
            assert np.isnan(one.teacher[:, -1]).all() and np.isnan(one.student[:, -1]).all()
            np.testing.assert_allclose(np.nansum(one.student, axis=1), 1, rtol=1e-5)
            if mode == "mean":
                assert np.isnan(one.teacher[-1]).all()
                np.testing.assert_allclose(np.nansum(one.teacher[:-1], axis=1), 1, rtol=1e-5)
    panels = both_maps(found, tokens)
    assert titles(panels) == [f"teacher, what t{num - 1} looks at", "student, what t-1 looks at"]
    assert panels[0].values.shape == (2, num + 1)
    assert panels[0].row_labels == panels[1].row_labels == ["layer 0", "layer 1"]


def test_packed_documents_stay_apart(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase, acl_imdb: Path
) -> None:
    teacher = write_tiny_language_model(tmp_path / "teacher", gpt2_tokenizer)
    asked: dict[str, Any] = {"attention": "mean", "max_length": 64, "unlabeled": None}
    cache = cache_language(tmp_path / "cache", teacher, acl_imdb, **asked)
    run = train_student.run(student_config(cache, tmp_path / "run", batch_size=2, **ONE_STEP)).run
    reader = CacheReader(cache)
    samples = [reader.sample(idx) for idx in range(len(reader))]
    sample = max(samples, key=lambda one: int(one["segment"].max()))
    (one,) = InsideOfRun.of(run, reader).matched_attention(sample).layers
    segment = sample["segment"]
    inside = np.tril(segment[:, None] == segment[None])
    assert segment.max() > 0
    assert np.array_equal(np.isfinite(one.teacher), inside)
    assert np.array_equal(np.isfinite(one.student), inside)


def test_what_cannot_be_compared_is_refused(
    mapped: Path, run: Path, tmp_path: Path, tiny_bert: Path, tiny_cache: Path, acl_imdb: Path,
    bert_tokenizer: Any,
) -> None:  # fmt: skip
    picture = tmp_path / "out.png"
    sample = ("--sample", first_id(mapped))
    drawn = (*sample, "--attention-image", picture)
    refused("inspect", mapped, *sample, "--run", run, saying="give the picture's file with --att")
    refused("inspect", mapped, *drawn, "--run", tmp_path, saying="is no run")
    refused(
        *("inspect", tiny_cache, "--sample", first_id(tiny_cache), "--run", run),
        *("--attention-image", picture),
        saying="--attention-image needs attention maps, and the cache was made without",
    )
    start = train_student.run(
        student_config(mapped, tmp_path / "hf").model_copy(
            update={"arch": f"hf:{tiny_bert}", **ONE_STEP}
        )
    )
    refused("inspect", mapped, *drawn, "--run", start.run, saying="is no Mamba student, and only")
    assert not picture.exists()

    texts = [path.read_text() for path in sorted(acl_imdb.glob("train/*/*.txt"))]
    other = bert_tokenizer.train_new_from_iterator(texts, 300)
    teacher = write_tiny_bert(tmp_path / "other", other)
    asked: dict[str, Any] = {"attention": "mean", "unlabeled": None}
    reader = CacheReader(cache_reviews(tmp_path / "c", teacher, acl_imdb, **asked))
    with pytest.raises(UserError, match=rf"{re.escape(str(run))} reads other tokens than .* holds"):
        InsideOfRun.of(run, reader)


def test_a_run_that_reads_the_text_with_its_own_tokenizer_is_refused(
    mapped: Path, run: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    record = read_run(other)
    aligned = {"alignment": {"kind": "spans", "map_sha256": "0" * 64}}
    replace(record, settings=record.settings | aligned).write(other)
    with pytest.raises(UserError, match=r"other reads the text with its own tokenizer"):
        InsideOfRun.of(other, CacheReader(mapped))


def test_a_run_of_another_cache_of_the_same_tokens_is_taken(
    mapped: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = student_config(tiny_cache, tmp_path / "run", **ONE_STEP)
    reader = CacheReader(mapped)
    inside = InsideOfRun.of(train_student.run(config).run, reader)
    assert inside.matched_attention(reader.sample(0)).layers[0].pair == (0, 1)
