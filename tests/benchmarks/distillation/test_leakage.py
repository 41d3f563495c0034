from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.distillation.leakage import Overlap, check, normalised, overlap, view_overlaps
from teacher_cache.cache.errors import CheckFailed
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.tokenization import Reading
from teacher_cache.stages.data.views import Views

TEST = ["A warm, funny film that never drags.", "Straße: 7 von 10!", "..."]
READING = Reading(
    mask_token="[MASK]",
    cut=lambda text: (text,),
    ids=lambda text: [len(word) for word in text.split()],
)
APART = ["A cold, dull film that drags.", "Street: 7 of 10", "?!"]


def test_normal_form() -> None:
    assert normalised(" A  Warm,\n“funny” FILM… ") == "a warm funny film"
    assert normalised(TEST[1]) == "strasse 7 von 10"
    assert normalised("...") == ""


def test_corpora_that_are_apart_pass() -> None:
    found = check({"train": APART, "plots": []}, {"test": TEST})
    assert found == [
        Overlap(part="train", held_out="test", num_texts=3, num_exact=0, num_normalised=0),
        Overlap(part="plots", held_out="test", num_texts=0, num_exact=0, num_normalised=0),
    ]


@pytest.mark.parametrize(
    ("planted", "num_exact"),
    [
        (TEST[0], 1),
        ("a warm funny film — that never DRAGS", 0),
        ("A warm,\tfunny film that never drags", 0),
        ("STRASSE 7 VON 10", 0),
        ("...", 1),
    ],
)
def test_a_planted_text_is_found(planted: str, num_exact: int) -> None:
    found = overlap("train", [*APART, planted], "test", TEST)
    assert (found.num_texts, found.num_exact, found.num_normalised) == (4, num_exact, 1)
    with pytest.raises(CheckFailed, match=rf"1 of the 4 texts of train .* of test \({num_exact} "):
        check({"plots": APART, "train": [*APART, planted]}, {"validation": APART[:0], "test": TEST})


def test_punctuation_alone_is_no_match() -> None:
    assert overlap("train", ["!", "—"], "test", TEST).num_normalised == 0


def test_views_that_read_like_a_held_out_text_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "one two three"}\n{"text": "four five six"}\n')
    config = CorpusConfig(source=str(tmp_path), split="train", labeled=False)
    corpus = load_corpus(config)
    views = [view.text for n in (1, 2) for view in Views(corpus, n, READING).documents(0, 2)]
    judged = {"test": [views[0].upper(), "seven"], "validation": ["eight"]}
    found = view_overlaps({"train": config}, judged, num_views=2, reading=READING)
    assert [(one.part, one.held_out, one.num_texts) for one in found] == [
        ("views of train", "test", len(views)),
        ("views of train", "validation", len(views)),
    ]
    same = sum(normalised(view) == normalised(views[0]) for view in views)
    assert [one.num_normalised for one in found] == [same, 0]
