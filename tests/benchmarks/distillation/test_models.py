"""What a model is asked, and what that costs: on a tiny teacher with the real tokenizer."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from benchmarks.distillation import cost, predictions
from benchmarks.distillation.corpora import corpus_config, read_corpora
from benchmarks.distillation.predictions import HeldOut
from benchmarks.distillation.scale import TINY
from benchmarks.distillation.tfidf import fit
from teacher_cache.stages.data.packaged.reviews import LABEL_NAMES

MAX_LENGTH = 16


@pytest.fixture(scope="module")
def held_out(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = read_corpora(TINY)["full"]
    corpus.write(folder)
    movies = [row["movie_name"] for row in corpus.held_out]
    return HeldOut.load(corpus_config(folder, "test"), movies)


def test_a_model_is_asked_once(
    held_out: HeldOut, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = copytree(tiny_bert, tmp_path / "teacher")
    first = predictions.of_teacher(teacher, MAX_LENGTH, held_out)
    classifier = predictions.load_teacher(teacher, MAX_LENGTH)
    samples = classifier.tokenize(held_out.documents)
    # Batches of other lengths change the last bits only.
    np.testing.assert_allclose(first.logits, classifier.logits(samples, batch_tokens=64), rtol=1e-4)
    assert first.num_parameters == classifier.num_parameters
    assert first.num_parameters - first.num_outside == 32 * classifier.model.config.vocab_size
    monkeypatch.setattr(predictions, "load_teacher", None)
    again = predictions.of_teacher(teacher, MAX_LENGTH, held_out)
    assert np.array_equal(again.logits, first.logits)
    assert (again.num_parameters, again.num_outside) == (first.num_parameters, first.num_outside)


def test_cost_is_of_the_same_full_batches(held_out: HeldOut, tiny_bert: Path) -> None:
    classifier = predictions.load_teacher(tiny_bert, MAX_LENGTH)
    models = {"teacher": classifier, "student": classifier}
    found = cost.measure(models, held_out.documents, num_batches=2, num_repeats=3)
    assert (found.batch_size, found.num_reviews) == (32, 64)
    assert {name: len(passes) for name, passes in found.passes_s.items()} == dict(
        teacher=3, student=3
    )
    median = sorted(found.passes_s["teacher"])[1]
    assert found.ms_per_review["teacher"] == pytest.approx(1000 * median / 64)
    assert found.ratio("teacher", "teacher") == 1


def test_baseline_learns_words_and_pairs(assets: Path) -> None:
    train = read_corpora(TINY)["full"].train
    found = fit(train, [row["text"] for row in train], {"C": 100.0})
    labels = [LABEL_NAMES.index(row["category"]) for row in train]
    assert (found.log_probs.argmax(axis=1) == labels).mean() > 0.95, "it was fitted on them"
    np.testing.assert_allclose(np.exp(found.log_probs).sum(axis=1), 1)
    unsure = fit(train, [row["text"] for row in train], {"C": 1e-4})
    assert np.exp(unsure.log_probs).max() < np.exp(found.log_probs).max()
