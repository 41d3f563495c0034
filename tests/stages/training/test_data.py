from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.tokenization import Reading
from teacher_cache.stages.data.views import Views
from teacher_cache.stages.training import data
from teacher_cache.stages.training.batches import held_out
from teacher_cache.stages.training.config import UnlabeledFrom
from teacher_cache.stages.training.data import TrainingData, open_splits, training_data
from tests.tiny_runs import MAX_LENGTH, reviews_config, student_config

Restrict = Callable[[str, Sequence[int]], None]


def prepared(cache: Path, **changes: Any) -> TrainingData:
    config = student_config(cache, cache, **changes)
    readers = open_splits(cache, config.objective.unlabeled_alpha, config.training.unlabeled_from)
    return training_data(config.training, config.objective, readers)


def test_samples_are_trained_on_or_held_out(tiny_cache: Path) -> None:
    found = prepared(tiny_cache)
    reader = CacheReader(tiny_cache)
    out = held_out(reader.sample_ids(), 0.2)
    assert found.evaluation is not None
    evaluated = [found.evaluation[at]["sample_id"].tobytes() for at in range(len(found.evaluation))]
    trained = [found.training[at]["sample_id"].tobytes() for at in range(len(found.training))]
    ids = list(reader.sample_ids())
    assert sorted(evaluated) == sorted(one for one, is_out in zip(ids, out, strict=True) if is_out)
    assert trained == [one for one, is_out in zip(ids, out, strict=True) if not is_out]
    assert found.evaluation.lengths.tolist() == sorted(found.evaluation.lengths)


def test_both_kinds_where_both_count(tiny_cache: Path) -> None:
    assert prepared(tiny_cache).training.unlabeled is None
    both = prepared(tiny_cache, unlabeled_alpha=0.3).training
    assert both.unlabeled is not None
    assert len(both.unlabeled) == len(CacheReader(tiny_cache, "unlabeled"))


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "num_steps"),
    [
        ({}, 12, 24),
        ({"unlabeled_alpha": 0.3}, 24, 48),  # one unlabelled batch after each labelled one
        ({"unlabeled_alpha": 0.3, "unlabeled_ratio": 0.5}, 18, 36),
        ({"gradient_accumulation": 4}, 3, 6),
        ({"epochs": 0.001}, 12, 1),
        ({"epochs": 1.5}, 12, 18),
        ({"max_steps": 7}, 12, 7),
    ],
)
def test_how_long_it_takes(
    tiny_cache: Path, changes: dict[str, Any], steps_per_epoch: int, num_steps: int
) -> None:
    given = {"max_steps": None, "epochs": 2, "batch_size": 8} | changes
    found = prepared(tiny_cache, **given)
    num_labeled = len(found.training.labeled)
    assert -(-num_labeled // 8) == 12, "the fixture's reviews changed: adapt the numbers here"
    assert (found.steps_per_epoch, found.num_steps) == (steps_per_epoch, num_steps)
    assert len(found.batches) == num_steps * given.get("gradient_accumulation", 1)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Restrict:
    """Lets the readers see some samples only."""

    def restrict(split: str, keep: Sequence[int]) -> None:
        class Restricted(CacheReader):
            def __init__(self, cache: Path, split_name: str = "labeled"):
                super().__init__(cache, split_name)
                self.chosen = list(keep) if split_name == split else list(range(super().__len__()))

            def __len__(self) -> int:
                return len(self.chosen)

            def lengths(self) -> np.ndarray:
                return super().lengths()[self.chosen]

            def column(self, name: str) -> np.ndarray:
                return super().column(name)[self.chosen]

            def sample_ids(self) -> Any:
                ids = list(super().sample_ids())
                return (ids[sample_idx] for sample_idx in self.chosen)

        monkeypatch.setattr(data, "CacheReader", Restricted)

    return restrict


def test_samples_of_one_class_are_refused(tiny_cache: Path, only: Restrict) -> None:
    only("labeled", np.flatnonzero(CacheReader(tiny_cache).column("label") == 1)[:20].tolist())
    with pytest.raises(UserError, match=r"are all of class \[1\]: cache more"):
        prepared(tiny_cache)


@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_a_split_without_samples_is_refused(tiny_cache: Path, only: Restrict, split: str) -> None:
    only(split, [])
    with pytest.raises(UserError, match=rf"the {split} split of .* holds no samples"):
        prepared(tiny_cache, unlabeled_alpha=0.3)


@pytest.fixture(scope="module")
def viewed_cache(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    """60 labelled documents and two views of each, and no unlabelled corpus."""
    config = reviews_config(tmp_path_factory.mktemp("viewed") / "c", tiny_bert, acl_imdb)
    labeled = config.labeled.model_copy(update={"max_samples": 60})
    changes = {"labeled": labeled, "unlabeled": None, "views": 2}
    return cache_teacher.run(config.model_copy(update=changes)).cache


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5])
def test_views_of_held_out_documents_are_left_out(
    viewed_cache: Path, acl_imdb: Path, bert_tokenizer: PreTrainedTokenizerBase, fraction: float
) -> None:
    corpus = load_corpus(CorpusConfig(source=str(acl_imdb), split="train", max_samples=60))
    documents = corpus.documents(0, 60)
    texts = {one.sample_id: set(one.text.split()) for one in documents}
    out = held_out(texts, fraction)
    held = {one for one, is_out in zip(texts, out, strict=True) if is_out}
    trained = prepared(viewed_cache, unlabeled_alpha=0.3, eval_fraction=fraction).training
    assert trained.unlabeled is not None
    num_both = len(trained.unlabeled)
    ids = {trained.unlabeled[idx]["sample_id"].tobytes() for idx in range(num_both)}
    reading = Reading.of(bert_tokenizer, max_length=MAX_LENGTH)
    made = [view for number in (1, 2) for view in Views(corpus, number, reading).documents(0, 60)]
    by_position = {one.position: one.sample_id for one in documents}
    foreign = set().union(*(texts[one] for one in held))
    foreign -= set().union(*(words for one, words in texts.items() if one not in held))
    num_own = 0
    for view in made:
        if by_position[view.position] in held:
            num_own += 1
            assert view.sample_id not in ids
        elif view.sample_id in ids:
            # Nor is anything trained on that only a held-out document says.
            assert not set(view.text.split()) & foreign
    # A splice with a document that is held out goes too: about a quarter of the views are splices.
    assert 120 - num_own - num_both <= 40
    assert (num_both == 120 and not held) if fraction == 0 else num_both < 120 - num_own
    assert len(trained) == len(trained.labeled) + num_both


def test_views_alone_are_unlabelled_text(viewed_cache: Path, tiny_cache: Path) -> None:
    assert prepared(viewed_cache).training.unlabeled is None
    readers = open_splits(viewed_cache, 0.3)
    assert [reader.split for reader in readers] == [
        *("labeled", "labeled_views_1", "labeled_views_2")
    ]
    data = prepared(viewed_cache, unlabeled_alpha=0.3, eval_fraction=0).training
    assert data.unlabeled is not None
    expected = [reader.sample(idx) for reader in readers[1:] for idx in range(len(reader))]
    for idx, sample in enumerate(expected):
        found = data.unlabeled[idx]
        assert found["sample_id"] == sample["sample_id"] and "label" not in found
        assert len(sample["input_ids"]) == data.unlabeled.lengths[idx]


def test_empty_views_take_no_part(viewed_cache: Path, only: Restrict) -> None:
    only("labeled_views_1", [])
    readers = open_splits(viewed_cache, 0.3)
    assert [reader.split for reader in readers] == ["labeled", "labeled_views_2"]


def test_nothing_unlabelled_to_train_on(viewed_cache: Path, only: Restrict) -> None:
    only("labeled_views_1", [])
    readers = open_splits(viewed_cache, 0.3)[:1]
    config = student_config(viewed_cache, viewed_cache, unlabeled_alpha=0.3)
    with pytest.raises(UserError, match="no view of a document that is trained on"):
        training_data(config.training, config.objective, readers)


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    """120 labelled and 60 unlabelled documents, and a view of each."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    return cache_teacher.run(reviews_config(folder, tiny_bert, acl_imdb, views=1)).cache


@pytest.mark.parametrize(
    ("part", "splits"),
    [
        ("corpus", ["unlabeled"]),
        ("views", ["labeled_views_1", "unlabeled_views_1"]),
        ("labeled-views", ["labeled_views_1"]),
        ("all", ["labeled_views_1", "unlabeled", "unlabeled_views_1"]),
    ],
)
def test_which_unlabelled_samples_take_part(
    whole_cache: Path, part: UnlabeledFrom, splits: list[str]
) -> None:
    readers = open_splits(whole_cache, 0.3, part)
    assert [reader.split for reader in readers] == ["labeled", *splits]
    wanted = [one for split in splits for one in CacheReader(whole_cache, split).sample_ids()]
    data = prepared(whole_cache, unlabeled_alpha=0.3, unlabeled_from=part, eval_fraction=0)
    unlabeled = data.training.unlabeled
    assert unlabeled is not None
    found = [unlabeled[idx]["sample_id"].tobytes() for idx in range(len(unlabeled))]
    assert found == wanted


def test_a_part_that_is_not_in_the_cache_is_refused(tiny_cache: Path, viewed_cache: Path) -> None:
    with pytest.raises(UserError, match=r"views needs views .* holds none, only unlabeled: make"):
        open_splits(tiny_cache, 0.3, "views")
    with pytest.raises(UserError, match=r"labeled-views needs views .* make a cache with --views"):
        open_splits(tiny_cache, 0.3, "labeled-views")
    with pytest.raises(UserError, match=r"corpus needs an unlabelled corpus .* with --unlabeled,"):
        open_splits(viewed_cache, 0.3, "corpus")
