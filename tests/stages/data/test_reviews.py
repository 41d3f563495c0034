"""The published figures of the reviews, and that no movie is on both sides of a split."""

from __future__ import annotations

import bz2
import csv
import io
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, load_corpus
from teacher_cache.stages.data.packaged.reviews import LABEL_NAMES
from teacher_cache.stages.data.survey import survey


def _split(name: str) -> Corpus:
    return load_corpus(CorpusConfig(source="reviews", split=name, labeled=name != "unlabeled"))


def _texts(name: str) -> set[str]:
    corpus = _split(name)
    return {document.text for document in corpus.documents(0, len(corpus))}


@pytest.fixture(scope="module")
def rows(assets: Path) -> list[dict[str, str]]:
    """All rows of the file, read without any of our code."""
    content = bz2.decompress((assets / "reviews" / "reviews.csv.bz2").read_bytes()).decode()
    return list(csv.DictReader(io.StringIO(content)))


@pytest.fixture(scope="module")
def movie_of(rows) -> dict[str, str]:
    """The movie of each review text; a text that comes twice belongs to the first."""
    movies: dict[str, str] = {}
    for row in rows:
        if row["category"] != "plot" and row["text"].strip():
            movies.setdefault(row["text"], row["movie_name"])
    return movies


def test_published_counts(rows):
    counts = [_split(name).label_counts() or {} for name in ("test", "train-all")]
    assert sum(sum(count.values()) for count in counts) == 12_752
    assert sum(count["fresh"] for count in counts) == 7_368
    assert len({row["movie_name"] for row in rows if row["category"] != "plot"}) == 508


def test_published_test_split(movie_of):
    test = _split("test")
    assert len(test) == 2_492
    assert round(max((test.label_counts() or {}).values()) / len(test), 2) == 0.55
    # One of the 508 movies has only texts that an earlier movie has: 507 are left to shuffle.
    movies = sorted(set(movie_of.values()))
    assert len(movies) == 507
    np.random.RandomState(0).shuffle(movies)
    assert {movie_of[text] for text in _texts("test")} == set(movies[:100])
    assert {movie_of[text] for text in _texts("validation")} == set(movies[100:150])
    assert {movie_of[text] for text in _texts("train")} == set(movies[150:-120])
    stripped = {movie_of[text] for text in _texts("unlabeled") if text in movie_of}
    assert stripped == set(movies[-120:])


def test_no_text_is_in_two_splits():
    splits = [_texts(name) for name in ("train", "validation", "test", "unlabeled")]
    assert sum(map(len, splits)) == len(set().union(*splits))
    assert _texts("train-all") >= _texts("train") | _texts("validation")
    assert not _texts("train-all") & _texts("test")


def test_unlabeled_text_has_no_plot_of_a_held_out_movie(rows, movie_of):
    held_out = {movie_of[text] for name in ("validation", "test") for text in _texts(name)}
    plots = {row["text"]: row["movie_name"] for row in rows if row["category"] == "plot"}
    used = [plots[text] for text in _texts("unlabeled") if text in plots]
    assert len(used) == 1_036
    assert not held_out & set(used)


def test_nothing_is_empty_or_repeated():
    for name in ("train", "validation", "test", "unlabeled", "train-all"):
        report = survey(_split(name))
        assert (report.num_empty, report.num_duplicates) == (0, 0)


def test_rotten_is_0_and_fresh_is_1(rows):
    category = {row["text"]: row["category"] for row in rows}
    test = _split("test")
    assert test.label_names == LABEL_NAMES == ("rotten", "fresh")
    for document in test.documents(0, 200):
        assert LABEL_NAMES[document.label or 0] == category[document.text]


def test_the_unlabeled_split_has_no_labels():
    assert _split("unlabeled").documents(0, 1)[0].label is None


def test_the_identity_names_the_package_data_and_no_path(assets):
    identity = _split("train").identity
    assert identity["kind"] == "packaged"
    assert identity["name"] == "reviews"
    assert str(assets) not in str(identity)
