"""Views of documents: each a function of its document, its number and the seed, and of no limit."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, Document, load_corpus
from teacher_cache.stages.data.survey import survey_splits
from teacher_cache.stages.data.tokenization import Reading
from teacher_cache.stages.data.views import View, Views, perturb, views_of, with_views
from teacher_cache.stages.training.batches import held_out

MASK = "[MASK]"


def reading(mask_token: str | None = MASK, max_words: int | None = None) -> Reading:
    """A model whose tokens are words, and which reads so many of them."""
    return Reading(
        mask_token=mask_token,
        cut=lambda *texts: tuple(
            text if max_words is None else " ".join(text.split()[:max_words]) for text in texts
        ),
        ids=lambda *texts: [
            zlib.crc32(word.encode()) for text in texts for word in text.split()[:max_words]
        ],
    )


TEXT = "one two three four five six seven"
_WORDS = st.text(st.sampled_from("ab ü\n好電ไ"), max_size=40)
_MASKS = st.sampled_from([MASK, None])


def document_of(text: str, position: int = 0) -> Document:
    return Document(text=text, source="films", split="train", position=position, label=1)


def views(
    text: str,
    num: int = 1,
    *,
    seed: int = 0,
    mask_token: str | None = MASK,
    other: Document | None = None,
) -> list[View | None]:
    given = document_of(text)
    return perturb(given, num, seed=seed, reading=reading(mask_token), other=lambda _: other)


def many(text: str, *, mask_token: str | None = MASK, other: Document | None = None) -> list[str]:
    """What many seeds make of a text."""
    found = [views(text, seed=seed, mask_token=mask_token, other=other)[0] for seed in range(300)]
    return [view.text for view in found if view is not None]


@given(text=_WORDS, other=_WORDS, mask_token=_MASKS, seed=st.integers(0, 9))
def test_views_differ_from_the_document_and_from_each_other(
    text: str, other: str, mask_token: str | None, seed: int
) -> None:
    partner = document_of(other, 1)
    found = views(text, 4, seed=seed, mask_token=mask_token, other=partner)
    assert found == views(text, 4, seed=seed, mask_token=mask_token, other=partner)
    # However many are made, the first ones are the same.
    assert found[:2] == views(text, 2, seed=seed, mask_token=mask_token, other=partner)
    made = [view for view in found if view is not None]
    assert all(view.text.strip() and view.label is None for view in made)
    spaced = [" ".join(one.split()) for one in (text, *(view.text for view in made))]
    assert len(set(spaced)) == len(spaced)
    ids = {document_of(text).sample_id, *(view.sample_id for view in made)}
    assert len(ids) == 1 + len(made)
    assert text.strip() or not made


@given(text=_WORDS, other=_WORDS, bound=st.floats(0, 1))
def test_a_view_is_held_out_exactly_when_one_of_its_documents_is(
    text: str, other: str, bound: float
) -> None:
    document, partner = document_of(text), document_of(other, 1)
    asked: list[bool] = []

    def choose(_: object) -> Document:
        asked[-1] = True
        return partner

    alone, either = held_out([document.sample_id, partner.sample_id], bound)
    for seed in range(8):
        asked.append(False)
        (view,) = perturb(document, 1, seed=seed, reading=reading(), other=choose)
        if view is None:
            continue
        (out,) = held_out([view.sample_id], bound)
        assert out >= alone
        assert out <= (alone or either)
        if not asked[-1]:
            assert out == alone


def test_a_splice_has_the_smaller_place() -> None:
    document, partner = document_of("a b c d e f"), document_of("u v w x y z", 1)
    smaller = min(document.sample_id, partner.sample_id)[:8]
    spliced = 0
    for first, second in ((document, partner), (partner, document)):
        for seed in range(100):
            (view,) = perturb(first, 1, seed=seed, reading=reading(), other=lambda _, o=second: o)
            assert view is not None
            if set(view.text.split()) & set(second.text.split()):
                assert view.sample_id[:8] == smaller
                spliced += 1
            else:
                assert view.sample_id[:8] == first.sample_id[:8]
    assert 20 < spliced < 80  # about a quarter of 200


def test_seeds_and_numbers_make_other_views() -> None:
    text = " ".join(str(number) for number in range(1000))
    other = document_of(text[::-1], 1)
    made = [views(text, 5, seed=seed, other=other) for seed in range(5)]
    assert len({view.text for found in made for view in found if view is not None}) == 25


def test_kinds_and_shares() -> None:
    text = " ".join(f"w{number}" for number in range(60))
    other = document_of(" ".join(f"x{number}" for number in range(60)), 1)
    found = many(text, other=other)
    masked = [view.split().count(MASK) for view in found if MASK in view]
    assert 120 < len(masked) < 180  # half of 300
    assert 5 < np.mean(masked) < 7  # a tenth of 60
    spliced = [view.split() for view in found if "x" in view]
    assert 50 < len(spliced) < 100  # a quarter
    for words in spliced:
        num_own = sum(word[0] == "w" for word in words)
        assert 20 <= num_own <= 40 and 60 <= len(words) <= 61
        assert words[:num_own] == text.split()[:num_own]
        assert words[num_own:] == other.text.split()[num_own - len(words) :]
    parts = [view.split() for view in found if MASK not in view and "x" not in view]
    assert len(parts) + len(spliced) + len(masked) == len(found) == 300
    for words in parts:
        start = text.split().index(words[0])
        assert words == text.split()[start : start + len(words)] and 20 <= len(words) < 60
    assert {len(words) for words in parts} >= {20, 59}


def test_without_a_mask_token_words_are_dropped() -> None:
    text = " ".join(f"w{number}" for number in range(40))
    gaps = [view for view in many(text, mask_token=None) if len(view.split()) > 37]
    assert any(view.split() != text.split()[: len(view.split())] for view in gaps)
    assert MASK not in "".join(gaps)


def test_spaces_stay_as_they_are() -> None:
    text = "one\n\ntwo  three\tfour"
    assert f"one\n\n{MASK}  three\tfour" in many(text)


@pytest.mark.parametrize("text", ["這部電影很好看", "とてもいい映画です", "หนังดีมาก"])
def test_scripts_without_spaces_are_taken_by_character(text: str) -> None:
    found = many(text)
    assert any(MASK in view and len(view.replace(MASK, "")) == len(text) - 1 for view in found)
    assert any(view in text and len(view) < len(text) for view in found)


@pytest.mark.parametrize("text", ["", " \n", "good"])
def test_a_text_of_one_word_or_none_has_no_view(text: str) -> None:
    assert views(text, 3) == [None] * 3


def test_a_single_word_is_spliced() -> None:
    (view, *_) = views("good", 3, other=document_of("a very bad film", 1))
    assert view is not None and view.text.startswith("good ")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """50 documents; the last 10 have one word, an eleventh none."""
    texts = [f"film {idx} was {'good' if idx % 2 else 'bad'} and long" for idx in range(39)]
    texts += [" ", *(f"word{idx}" for idx in range(10))]
    lines = [f'"{text}",{"pos" if idx % 2 else "neg"}' for idx, text in enumerate(texts)]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *lines]))
    return tmp_path / "films.csv"


def corpus_of(films: Path, **changes: object) -> Corpus:
    return load_corpus(CorpusConfig.model_validate({"source": str(films), **changes}))


def made_of(corpus: Corpus, bounds: Sequence[int], number: int = 2) -> list[View]:
    """All views of a number, shard by shard."""
    split = Views(corpus, number, reading())
    found: list[View] = []
    for start, stop in itertools.pairwise(bounds):
        found += split.documents(start, stop)
    return found


@pytest.fixture(scope="module")
def long_films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents that have every view."""
    path = tmp_path_factory.mktemp("films") / "long.csv"
    lines = [f'"film {idx} was {idx % 7}, not long",{idx % 2}' for idx in range(30)]
    path.write_text("\n".join(["text,label", *lines]))
    return path


@given(cuts=st.sets(st.integers(1, 29)), limit=st.integers(1, 30))
@settings(max_examples=10)
def test_neither_shards_nor_limits_change_a_view(
    long_films: Path, cuts: set[int], limit: int
) -> None:
    corpus = corpus_of(long_films)
    whole = made_of(corpus, [0, 30])
    assert made_of(corpus, [0, *sorted(cuts), 30]) == whole
    assert made_of(corpus_of(long_films, max_samples=limit), [0, limit]) == whole[:limit]
    assert len({view.sample_id for view in whole}) == 30


def test_views_stay_what_they_are() -> None:
    # Caches hold them: another text here takes another `version` in the settings.
    first, second = views(TEXT, 2)
    assert first is not None and second is not None
    assert (first.text, second.text) == ("two three four", "[MASK] two three four five six seven")
    (own, hashed) = (document_of(text).sample_id for text in (TEXT, first.text))
    assert first.sample_id == own[:8] + hashed[:8]


def test_what_is_left_out_is_counted(films: Path) -> None:
    corpus = corpus_of(films)
    splits = with_views({"labeled": corpus}, 2, reading())
    reports = survey_splits({"labeled": corpus}, 2, reading())
    assert list(splits) == list(reports) == ["labeled", "labeled_views_1", "labeled_views_2"]
    for name in ("labeled_views_1", "labeled_views_2"):
        report, num = reports[name], len(splits[name].documents(0, 50))
        assert report.num_documents == len(splits[name]) == 50
        assert report.num_empty == 1 and report.label_counts is None
        assert num + report.num_empty + report.num_unchanged == 50
    all_views = list(views_of(corpus, 0, 50, num=40, reading=reading()))
    assert any(made[-1] is None for made in all_views), "40 different views of two words?"
    reports = survey_splits({"labeled": corpus}, 40, reading())
    assert reports["labeled_views_40"].num_unchanged > 0
    assert "without another such view" in reports["labeled_views_40"].describe()


def test_only_what_is_read_of_a_long_document_is_perturbed() -> None:
    words = [f"w{idx}" for idx in range(300)]
    document, other = document_of(" ".join(words)), document_of(" ".join(["x"] * 300), 1)
    model = reading(max_words=60)
    shares = dict.fromkeys(("mask", "part", "splice"), 0)
    for seed in range(400):
        (view,) = perturb(document, 1, seed=seed, reading=model, other=lambda _: other)
        assert view is not None
        assert model.ids(view.text) != model.ids(document.text)
        assert not set(view.text.split()) & set(words[60:])
        kind = "mask" if MASK in view.text else "splice" if "x" in view.text else "part"
        shares[kind] += 1
    assert shares == {"mask": pytest.approx(200, abs=40)} | dict.fromkeys(
        ("part", "splice"), pytest.approx(100, abs=35)
    )


def test_no_two_views_read_the_same() -> None:
    # Of this document the model reads three words, so there are few views that it can tell apart.
    document, model = document_of("one two three four five"), reading(max_words=3)
    made = perturb(document, 60, seed=0, reading=model, other=lambda _: None)
    found = [tuple(model.ids(view.text)) for view in made if view is not None]
    assert 3 < len(found) == len(set(found)) < 60
    assert tuple(model.ids(document.text)) not in found
