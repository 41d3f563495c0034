"""The corpora of the quality benchmark, made from the real package."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.distillation.corpora import MovieCorpus, corpus_config, read_corpora
from benchmarks.distillation.leakage import check
from benchmarks.distillation.predictions import HeldOut
from benchmarks.distillation.scale import FULL, TINY
from teacher_cache.stages.data.corpus import load_corpus
from teacher_cache.stages.data.packaged.reviews import LABEL_NAMES, Row, read_reviews, read_rows

Corpora = dict[str, MovieCorpus]


@pytest.fixture(scope="module")
def corpora(assets: Path) -> Corpora:
    return read_corpora(FULL)


def movies(rows: list[Row]) -> set[str]:
    return {row["movie_name"] for row in rows}


def texts(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


def test_sizes(corpora: Corpora) -> None:
    sizes = {
        name: (len(one.train), len(one.unlabeled), len(one.held_out))
        for name, one in corpora.items()
    }
    assert sizes == {
        "tuning": (8_942, 1_036, 1_318),
        "full": (10_260, 1_055, 2_492),
        "scarce": (1_000, 10_260 - 1_000 + 1_055, 2_492),
    }


def test_held_out_movies_are_the_published_ones(corpora: Corpora) -> None:
    order = read_rows().movies
    assert movies(corpora["full"].held_out) == set(order[:100])
    assert movies(corpora["tuning"].held_out) == set(order[100:150])
    assert sorted(texts(corpora["full"].held_out)) == sorted(read_reviews("test")[0]["text"])


def test_no_movie_is_on_both_sides(corpora: Corpora) -> None:
    test, validation = movies(corpora["full"].held_out), movies(corpora["tuning"].held_out)
    for one in corpora.values():
        learned = movies(one.train) | movies(one.unlabeled)
        assert not learned & movies(one.held_out)
        assert not learned & test
        if one.name == "tuning":
            assert not learned & validation
    assert not test & validation
    assert validation <= movies(corpora["full"].train), "returned to training at the end"


def test_no_text_comes_twice(corpora: Corpora) -> None:
    for one in corpora.values():
        parts = [texts(one.train), texts(one.unlabeled), texts(one.held_out)]
        assert all(len(part) == len(set(part)) for part in parts)
        assert not any(set(a) & set(b) for a, b in combinations(parts, 2))


def test_nothing_leaks(corpora: Corpora) -> None:
    held_out = {name: texts(corpora[name].held_out) for name in ("full", "tuning")}
    for one in corpora.values():
        parts = {"train": texts(one.train), "unlabeled": texts(one.unlabeled)}
        compared = held_out if one.name == "tuning" else {"full": held_out["full"]}
        assert not any(found.num_normalised for found in check(parts, compared))


def test_scarce_labels_are_some_of_all(corpora: Corpora) -> None:
    labelled = texts(corpora["scarce"].train)
    assert len(labelled) == FULL.num_scarce and set(labelled) < set(texts(corpora["full"].train))
    assert corpora["scarce"].held_out == corpora["full"].held_out
    # All the rest is there without its labels.
    together = [*labelled, *texts(corpora["scarce"].unlabeled)]
    of_whole = [*texts(corpora["full"].train), *texts(corpora["full"].unlabeled)]
    assert sorted(together) == sorted(of_whole)
    again = read_corpora(FULL)["scarce"]
    assert texts(again.train) == texts(corpora["scarce"].train)
    shares = [
        sum(row["category"] == "fresh" for row in corpora[name].train) / len(corpora[name].train)
        for name in ("full", "scarce")
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.04), "a random choice"


def test_the_product_reads_what_was_written(tmp_path: Path, assets: Path) -> None:
    corpus = read_corpora(TINY)["scarce"]
    corpus.write(tmp_path)
    for split, rows in (
        ("train", corpus.train),
        ("unlabeled", corpus.unlabeled),
        ("test", corpus.held_out),
    ):
        read = load_corpus(corpus_config(tmp_path, split))
        found = sorted(read.documents(0, len(read)), key=lambda one: one.position)
        assert [one.text for one in found] == texts(rows)
        labels = [one.label for one in found]
        if split == "unlabeled":
            assert labels == [None] * len(rows)
        else:
            assert labels == [LABEL_NAMES.index(row["category"]) for row in rows]


def test_reviews_keep_their_movies_in_the_readers_order(tmp_path: Path, assets: Path) -> None:
    corpus = read_corpora(TINY)["full"]
    corpus.write(tmp_path)
    of_lines = [row["movie_name"] for row in corpus.held_out]
    held_out = HeldOut.load(corpus_config(tmp_path, "test"), of_lines)
    movie_of = {row["text"]: row["movie_name"] for row in corpus.held_out}
    names = sorted(movies(corpus.held_out))
    assert len(names) == TINY.num_test_movies
    for document, movie_idx, label in zip(
        held_out.documents, held_out.movie_idx, held_out.labels, strict=True
    ):
        assert movie_of[document.text] == names[movie_idx]
        assert document.label == label
