from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import (
    Corpus,
    CorpusConfig,
    load_corpus,
    load_with_fallback,
)
from teacher_cache.stages.data.opening import SourceUnavailable
from teacher_cache.stages.data.survey import survey
from teacher_cache.stages.finetune_teacher import warn_of_empty_classes


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """60 documents sorted by their label's name, as data sets often are."""
    lines = [f'"film {idx}",{"neg" if idx < 30 else "pos"}' for idx in range(60)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *lines]))
    return tmp_path / "films.csv"


@pytest.fixture(scope="module")
def reviews() -> Corpus:
    return load_corpus(CorpusConfig(source="reviews", split="test"))


def _load(source: Path, **settings: object) -> Corpus:
    return load_corpus(CorpusConfig.model_validate({"source": str(source), **settings}))


def test_a_limit_takes_the_start_of_a_shuffled_order(films):
    whole, part = _load(films), _load(films, max_samples=20)
    assert (len(whole), len(part)) == (60, 20)
    assert part.documents(0, 20) == whole.documents(0, 20)
    assert {document.label for document in part.documents(0, 20)} == {0, 1}
    assert part.identity == whole.identity
    positions = [document.position for document in whole.documents(0, 60)]
    assert sorted(positions) == list(range(60))
    assert positions != sorted(positions)


def test_a_limit_above_what_there_is(films):
    assert len(_load(films, max_samples=1000)) == 60


def test_positions_are_those_of_the_source(films):
    for document in _load(films).documents(0, 60):
        assert document.text == f"film {document.position}"
        assert document.label == (0 if document.position < 30 else 1)


def test_the_seed_changes_the_order_and_nothing_else(films):
    first, second = _load(films).documents(0, 60), _load(films, seed=1).documents(0, 60)
    assert first != second
    assert {d.sample_id for d in first} == {d.sample_id for d in second}


def test_the_order_never_changes(films):
    # Caches are built on it: these are RandomState(0).permutation(60)'s first.
    assert [d.position for d in _load(films).documents(0, 8)] == [26, 35, 59, 28, 11, 2, 34, 58]


@given(st.data())
def test_any_range_of_documents(reviews, data):
    start = data.draw(st.integers(0, len(reviews)))
    stop = data.draw(st.integers(start, min(len(reviews), start + 50)))
    documents = reviews.documents(start, stop)
    one_by_one = [reviews.documents(idx, idx + 1)[0] for idx in range(start, stop)]
    assert documents == one_by_one


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 61), (5, 4)])
def test_a_range_outside_is_refused(films, start, stop):
    with pytest.raises(IndexError, match="of a corpus of 60"):
        _load(films).documents(start, stop)


def test_columns_and_the_identity(tmp_path):
    (tmp_path / "t.csv").write_text("id,words,mood\n1,good,1\n2,bad,0\n")
    corpus = _load(tmp_path / "t.csv", text_column="words", label_column="mood")
    assert [document.text for document in corpus.documents(0, 2)] in (
        ["good", "bad"],
        ["bad", "good"],
    )
    assert corpus.identity["text_column"] == "words"
    assert corpus.identity["label_column"] == "mood"
    with pytest.raises(
        UserError, match=r"no column 'word' \(the columns are id, words, mood\): did"
    ):
        _load(tmp_path / "t.csv", text_column="word")


def test_an_unlabeled_corpus_reads_no_labels(films):
    corpus = _load(films, labeled=False)
    assert {document.label for document in corpus.documents(0, 60)} == {None}
    assert corpus.label_names is None
    assert corpus.identity["label_column"] is None
    assert corpus.with_class_names({0: "a", 1: "b"}) is corpus
    with pytest.raises(UserError, match="read without labels"):
        corpus.class_names()


def test_labels_become_the_teachers_class_ids(films):
    corpus = _load(films).with_class_names({0: "POS", 1: "NEG"})
    for document in corpus.documents(0, 60):
        assert document.label == (1 if document.position < 30 else 0)
    assert corpus.label_names == ("POS", "NEG")
    assert corpus.identity["class_ids"] == {"neg": 1, "pos": 0}
    json.dumps(corpus.identity)


def test_names_without_an_order_are_refused(films):
    with pytest.raises(UserError, match="--label-names neg,pos"):
        _load(films).with_class_names({0: "LABEL_0", 1: "LABEL_1"})
    ordered = _load(films, label_names=("pos", "neg"))
    corpus = ordered.with_class_names({0: "LABEL_0", 1: "LABEL_1"})
    # The classes are called as the corpus calls them: the teacher's names say nothing.
    assert corpus.label_counts() == {"pos": 30, "neg": 30}
    assert corpus.class_names() == ("pos", "neg")
    for document in corpus.documents(0, 60):
        assert document.label == (1 if document.position < 30 else 0)


def test_integers_outside_the_teachers_classes(tmp_path):
    (tmp_path / "stars.csv").write_text("text,label\na,1\nb,3\nc,5\n")
    corpus = _load(tmp_path / "stars.csv")
    with pytest.raises(UserError, match="labels 3, 5, and the teacher has 2 classes"):
        corpus.with_class_names({0: "no", 1: "yes"})
    assert corpus.class_names() == tuple(f"LABEL_{idx}" for idx in range(6))


def test_integers_below_zero_cannot_teach(tmp_path):
    (tmp_path / "mood.csv").write_text("text,label\na,-2\nb,2\n")
    with pytest.raises(UserError, match="label -2, expected integers from 0"):
        _load(tmp_path / "mood.csv").class_names()


def test_a_teacher_fine_tuned_here_fits_the_next_split(reviews):
    train = load_corpus(CorpusConfig(source="reviews", split="train"))
    teacher = dict(enumerate(train.class_names()))
    assert teacher == {0: "rotten", 1: "fresh"}
    mapped = reviews.with_class_names(teacher)
    assert mapped.documents(0, 50) == reviews.documents(0, 50)


def test_survey_counts_what_is_empty_and_repeated(tmp_path):
    rows = ["good,1", "bad,0", "good,0", '"  ",1', ",0", "good,1", "Good,1"]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]))
    report = survey(_load(tmp_path / "t.csv"))
    assert report.model_dump() == {
        "num_documents": 7,
        "num_empty": 2,
        "num_duplicates": 2,
        "num_unchanged": 0,
        "label_counts": {"0": 3, "1": 4},
        "num_without_label": 0,
        "num_dropped": 0,
        "longest": 4,
    }
    described = "7 documents (3 0, 4 1), 2 empty (left out), 2 duplicates (kept)"
    assert report.describe() == f"{described}, the longest of 4 characters"


def test_survey_honours_the_limit(films):
    report = survey(_load(films, max_samples=7))
    assert report.num_documents == 7
    assert sum((report.label_counts or {}).values()) == 7


def test_survey_without_labels(films):
    described = survey(_load(films, labeled=False)).describe()
    assert described == "60 documents, the longest of 7 characters"


def test_fallbacks_are_tried_in_order_and_said(films, tmp_path, caplog):
    missing = CorpusConfig(source=str(tmp_path / "missing.csv"))
    fallback = CorpusConfig(source=str(films))
    with caplog.at_level(logging.WARNING):
        corpus, used = load_with_fallback(missing, [missing, fallback])
    assert (len(corpus), used) == (60, fallback)
    assert len(caplog.records) == 1
    assert "falling back" in caplog.text


def test_nothing_falls_back_unasked(films, tmp_path, caplog):
    missing = CorpusConfig(source=str(tmp_path / "missing.csv"))
    with pytest.raises(SourceUnavailable, match="there is no file"):
        load_with_fallback(missing, [])
    with pytest.raises(SourceUnavailable, match=r"no source could be loaded; .*; there is no"):
        load_with_fallback(missing, [missing])
    _, used = load_with_fallback(CorpusConfig(source=str(films)), [missing])
    assert used.source == str(films)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_source_that_is_there_but_asked_wrongly_does_not_fall_back(films):
    wrong = CorpusConfig(source=str(films), text_column="words")
    with pytest.raises(UserError, match="no column 'words'"):
        load_with_fallback(wrong, [CorpusConfig(source=str(films))])


@pytest.mark.parametrize("settings", [{"max_samples": 0}, {"seed": -1}, {"sources": "x"}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(pydantic.ValidationError):
        CorpusConfig.model_validate({"source": "reviews", **settings})


@pytest.mark.parametrize(
    ("name", "content", "saying"),
    [
        ("t.txt", "__label__pos good\n__label__neg bad\n", "begin with their labels"),
        ("t.txt", "ham\tgood\nspam\tbad\n", "rows of a table .2 fields"),
        ("t.csv", 'text,label\na,joy\nb,"joy,anger"\nc,anger\n', "holds 'joy,anger', several"),
        ("t.csv", 'text,label\na,"[0, 1]"\nb,[0]\n', "several labels a document"),
        ("t.csv", "text,mood\na,1\n", "columns are text, mood.; or give text without labels"),
    ],
)
def test_labels_that_stand_where_none_are_read(tmp_path, name, content, saying):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=saying):
        _load(tmp_path / name)


@pytest.mark.parametrize("named", [{"label_column": "text"}, {"text_column": "label"}])
def test_texts_and_labels_are_two_columns(tmp_path, named):
    (tmp_path / "t.csv").write_text("text,label\na,pos\nb,neg\n")
    with pytest.raises(UserError, match=r"is named for both texts and labels .*text, label.: name"):
        _load(tmp_path / "t.csv", **named)


@pytest.mark.parametrize(
    ("labels", "said"), [((1, 2), "3 classes, .* 2 labels .1, 2"), ((0, 1), "")]
)
def test_a_teacher_of_classes_without_documents_is_said(tmp_path, caplog, labels, said):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"a,{one}\n" for one in labels))
    warn_of_empty_classes(_load(tmp_path / "t.csv"))
    warned = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert re.search(said, "".join(warned)) if said else not warned


def test_names_with_commas_of_their_own_are_one_label(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\na,"food, drink"\nb,"sports"\n')
    assert _load(tmp_path / "t.csv").label_names == ("food, drink", "sports")


def test_text_that_is_asked_for_as_text_is_read_as_it_is(tmp_path):
    (tmp_path / "t.txt").write_text("ham\tgood\nspam\tbad\n")
    corpus = _load(tmp_path / "t.txt", labeled=False)
    assert {one.text for one in corpus.documents(0, 2)} == {"ham\tgood", "spam\tbad"}


def test_every_setting_is_described():
    assert all(field.description for field in CorpusConfig.model_fields.values())
