from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data import views
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.tokenization import Reading, Sample, tokenize
from teacher_cache.stages.models.batching import PADDED
from teacher_cache.stages.models.inference import class_logits
from teacher_cache.stages.teacher.classification import Classification
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import identity, load_teacher
from teacher_cache.stages.teacher.task import Said
from tests.small_caches import contents
from tests.tiny_models import write_tiny_gpt2
from tests.tiny_runs import reviews_config, said_of


def sample_of(*ids: int) -> Sample:
    return Sample(
        sample_id=bytes([len(ids)] * 16),
        input_ids=np.array(ids, np.uint32),
        label=None,
        was_truncated=False,
    )


SAMPLES = [sample_of(*range(5, 5 + length)) for length in (3, 9, 4, 30, 17)]


def config_of(folder: Path, teacher: Path, **changes: object) -> CacheTeacherConfig:
    values = {
        "out": folder,
        "teacher": str(teacher),
        "name": "reviews",
        "labeled": CorpusConfig(source="reviews", split="train", max_samples=20),
        "max_length": 32,
    }
    return CacheTeacherConfig.model_validate(values | changes)


def test_the_head_of_a_half_precision_teacher_is_float32(tiny_bert: Path) -> None:
    teacher = load_teacher(TeacherConfig(teacher=str(tiny_bert), dtype="bfloat16", device="cpu"))
    assert isinstance(teacher.model, BertForSequenceClassification)
    assert teacher.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert teacher.model.classifier.weight.dtype == torch.float32
    fields = said_of(teacher, SAMPLES)
    logits = torch.from_numpy(np.asarray(fields["class_logits"]))
    assert (logits.bfloat16().float() != logits).any()


def test_a_decoder_pools_alike_in_a_batch_and_alone(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    # Its own padding token is not the tokenizer's end-of-text token, which would fill the batch.
    folder = write_tiny_gpt2(tmp_path, gpt2_tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    teacher = load_teacher(TeacherConfig(teacher=str(folder), device="cpu"))
    assert teacher.pad_id == 0
    ids = [sample.input_ids for sample in SAMPLES]
    batched, alone = (
        class_logits(
            teacher.model,
            ids,
            num_classes=2,
            pad_id=teacher.pad_id,
            batching=PADDED,
            max_tokens=budget,
        )
        for budget in (1000, 1)
    )
    np.testing.assert_allclose(batched.logits, alone.logits, atol=1e-5)


def test_logits_that_are_no_numbers_are_not_cached(tiny_bert: Path) -> None:
    teacher = load_teacher(TeacherConfig(teacher=str(tiny_bert), device="cpu"))
    assert isinstance(teacher.model, BertForSequenceClassification)
    with torch.no_grad():
        teacher.model.classifier.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"5 samples are not finite .* --dtype float32"):
        said_of(teacher, SAMPLES)


def test_the_teachers_configuration_is_in_its_identity(tiny_bert: Path, tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(teacher=str(tiny_bert), device="cpu"))
    teacher.model.config.hidden_act = "relu"
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    other = load_teacher(TeacherConfig(teacher=str(tmp_path), device="cpu"))
    assert other.weights_sha256 == teacher.weights_sha256
    assert identity(other, "") != identity(teacher, "")
    moved = replace(teacher, name="elsewhere")
    assert identity(moved, "") == identity(teacher, "")


def test_one_class_behind_a_limit_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    labeled = CorpusConfig(source="reviews", split="train", max_samples=1)
    config = config_of(tmp_path / "c", tiny_bert, labeled=labeled)
    with pytest.raises(UserError, match=r"of the class \w+: a classifier needs two"):
        cache_teacher.run(config.model_copy(update={"labeled": named(labeled)}))


def test_pooled_states_are_cached_beside_the_same_logits(
    tiny_cache: Path, pooled_cache: Path, tiny_bert: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny_bert).eval()
    for split in ("labeled", "unlabeled"):
        plain, pooled = CacheReader(tiny_cache, split), CacheReader(pooled_cache, split)
        for name in ("class_logits", "label"):
            assert np.array_equal(plain.column(name), pooled.column(name))
        for sample_idx in (0, len(pooled) - 1):
            sample = pooled.sample(sample_idx)
            with torch.no_grad():
                ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
                expected = model.bert(ids).pooler_output[0].numpy()
            assert sample["pooled"].dtype == np.float16
            np.testing.assert_allclose(sample["pooled"], expected, rtol=1e-3, atol=1e-5)
    # D is in the schema; a cache without the states has the settings that it always had.
    assert CacheReader(pooled_cache).manifest.schema[-1].shape == (32,)
    settings, other = (CacheReader(one).manifest.settings for one in (tiny_cache, pooled_cache))
    assert "hidden" not in settings and other == settings | {"hidden": "pooled"}


def test_other_states_on_an_existing_cache_are_refused(
    tiny_cache: Path, pooled_cache: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    asked = reviews_config(tiny_cache, tiny_bert, acl_imdb, hidden="pooled")
    with pytest.raises(UserError, match=r"hidden is None there and 'pooled' in .* --overwrite"):
        cache_teacher.run(asked)
    asked = reviews_config(pooled_cache, tiny_bert, acl_imdb)
    with pytest.raises(UserError, match=r"hidden is 'pooled' there and None in .* --overwrite"):
        cache_teacher.run(asked)


def named(corpus: CorpusConfig) -> CorpusConfig:
    """The reviews with the classes of the tiny teacher, whose names are others."""
    return corpus.model_copy(update={"label_names": ("rotten", "fresh")})


def test_a_fallback_leaves_out_text_that_only_the_preset_implied(
    tmp_path: Path, tiny_gpt2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fallback = named(CorpusConfig(source="reviews", split="train", max_samples=20))
    config = config_of(
        tmp_path / "c",
        tiny_gpt2,
        labeled=CorpusConfig(source=str(tmp_path / "missing.csv")),
        unlabeled=CorpusConfig(source=str(tmp_path / "missing.txt"), labeled=False),
        fallback=(fallback,),
    )
    with caplog.at_level(logging.WARNING, logger="teacher_cache"):
        result = cache_teacher.run(config)
    assert list(result.manifest.splits) == ["labeled"]
    assert result.manifest.about["fell_back_from"] == str(tmp_path / "missing.csv")
    assert "left out" in caplog.text and "--unlabeled" in caplog.text
    assert len(CacheReader(tmp_path / "c")) == 20
    with pytest.raises(UserError, match=r"missing\.txt"):
        chosen = config.model_copy(update={"unlabeled_is_named": True, "out": tmp_path / "d"})
        cache_teacher.run(chosen)


def viewed(folder: Path, teacher: Path, views: int, num: int = 20) -> CacheTeacherConfig:
    labeled = named(CorpusConfig(source="reviews", split="train", max_samples=num))
    return config_of(folder, teacher, labeled=labeled, views=views, shard_documents=8)


def test_a_cache_gains_views_and_computes_nothing_else(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(task: Classification, samples: Sequence[Sample], *given: Any) -> Said:
        seen.extend(sample.sample_id for sample in samples)
        return say(task, samples, *given)

    def computed(views: int, num: int = 20) -> int:
        seen.clear()
        cache_teacher.run(viewed(cache, tiny_bert, views, num))
        return len(seen)

    say, seen = Classification.say, list[bytes]()
    cache = tmp_path / "c"
    monkeypatch.setattr(Classification, "say", counted)
    assert computed(views=0) == 20
    labeled = contents(cache)
    first, second = (f"labeled_views_{number}" for number in (1, 2))
    assert computed(views=1) == 20
    assert list(CacheReader(cache, first).sample_ids()) == seen
    assert computed(views=2) == 20
    assert list(CacheReader(cache, second).sample_ids()) == seen
    assert computed(views=2) == 0
    grown = contents(cache)
    kept = [name for name in labeled if not name.startswith("manifest")]
    assert [labeled[name] for name in kept] == [grown[name] for name in kept]
    # The last, partial shard of each split, and the new documents: 16 of 20 stay.
    assert computed(views=2, num=23) == 3 * (23 - 16)
    assert verify(cache).problems == ()
    at_once = tmp_path / "at-once"
    cache_teacher.run(viewed(at_once, tiny_bert, views=2, num=23))
    assert contents(cache) == contents(at_once)
    with pytest.raises(UserError, match=r"23 labeled_views_2 documents.* asks for 0.*--views"):
        cache_teacher.run(viewed(cache, tiny_bert, views=1, num=23))


def test_views_made_in_another_way_are_not_mixed(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_teacher.run(viewed(tmp_path / "c", tiny_bert, views=1))
    monkeypatch.setitem(views.PERTURBATION, "version", 99)
    with pytest.raises(UserError, match=r"splits\.labeled_views_1\.version is 2 .* and 99 in"):
        cache_teacher.run(viewed(tmp_path / "c", tiny_bert, views=1))
    without = viewed(tmp_path / "c", tiny_bert, views=0)
    cache_teacher.run(without.model_copy(update={"overwrite": True}))
    assert not (tmp_path / "c" / "labeled_views_1").exists()


def test_views_of_both_corpora_are_what_the_teacher_saw(tmp_path: Path, tiny_bert: Path) -> None:
    unlabeled = CorpusConfig(source="reviews", split="unlabeled", labeled=False, max_samples=5)
    labeled = named(CorpusConfig(source="reviews", split="train", max_samples=20))
    config = config_of(tmp_path / "c", tiny_bert, labeled=labeled, unlabeled=unlabeled, views=2)
    result = cache_teacher.run(config)
    teacher = load_teacher(config.forward)
    assert list(result.manifest.splits) == [
        *("labeled", "unlabeled", "labeled_views_1", "labeled_views_2"),
        *("unlabeled_views_1", "unlabeled_views_2"),
    ]
    reading = Reading.of(teacher.tokenizer, max_length=32)
    for split, corpus in (("labeled", labeled), ("unlabeled", unlabeled)):
        made = views.Views(load_corpus(corpus), 2, reading).documents(0, corpus.max_samples or 0)
        found = CacheReader(tmp_path / "c", f"{split}_views_2")
        assert [view.sample_id for view in made] == list(found.sample_ids())
        assert (found.column("label") == -1).all()
        for sample_idx, sample in enumerate(tokenize(made, teacher.tokenizer, max_length=32)):
            assert found.sample(sample_idx)["input_ids"].tolist() == sample.input_ids.tolist()
    mask_id = teacher.tokenizer.mask_token_id
    first = CacheReader(tmp_path / "c", "labeled_views_1")
    assert any(mask_id in first.sample(idx)["input_ids"] for idx in range(len(first)))
