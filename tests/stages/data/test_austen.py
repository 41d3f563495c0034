from __future__ import annotations

import re
from pathlib import Path

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.packaged.austen import SPLITS, chapters, read_austen

NUM_CHAPTERS = {"train": 55 + 48 + 61 + 50, "validation": 31, "test": 24}

NOVEL = """A NOVEL

CHAPTER I

It was
a day.

   A verse
\t
CHAPTER II
The chapter 3 of
chapters were.


THE END
"""


def test_a_novel_is_cut_before_its_chapters() -> None:
    assert chapters(NOVEL) == [
        "A NOVEL\n\nCHAPTER I\n\nIt was a day.\n\nA verse",
        "CHAPTER II The chapter 3 of chapters were.\n\nTHE END",
    ]
    assert chapters("No\nheading.") == ["No heading."]


@pytest.mark.parametrize("split", SPLITS)
def test_every_word_of_a_novel_is_in_its_chapters(austen_dir: Path, split: str) -> None:
    table, digest = read_austen(split)
    assert len(digest) == 64
    assert len(table) == NUM_CHAPTERS[split]
    whole = " ".join((austen_dir / f"{name}.txt").read_text() for name in SPLITS[split])
    assert " ".join(table["text"]).split() == whole.split()
    assert all(re.search(r"(?i)\bchapter [0-9ivxl]+\b", text) for text in table["text"])


def test_all_novels_are_there_and_none_in_two_splits(austen_dir: Path) -> None:
    novels = [name for names in SPLITS.values() for name in names]
    files = {path.stem: path for path in austen_dir.glob("*.txt")}
    assert sorted(novels) == sorted(files)
    for name, path in files.items():
        first = path.read_text().splitlines()[0]
        assert first.lower().replace(" ", "-") == name
    assert 3_900_000 < sum(len(path.read_text()) for path in files.values()) < 4_600_000


def test_they_are_a_corpus_without_labels(austen_dir: Path) -> None:
    corpus = load_corpus(CorpusConfig(source="austen", split="test", labeled=False))
    assert len(corpus) == 24
    assert corpus.identity["kind"] == "packaged" and corpus.identity["name"] == "austen"
    assert all("Anne" in document.text for document in corpus.documents(0, 24))
    with pytest.raises(UserError, match=r"no split 'tset'.*did you mean 'test'"):
        load_corpus(CorpusConfig(source="austen", split="tset", labeled=False))


@pytest.mark.parametrize(
    ("unit", "least", "most"), [("line", 8000, 8400), ("paragraph", 900, 1100)]
)
def test_a_novels_file_is_read_by_line_or_paragraph(
    austen_dir: Path, unit: str, least: int, most: int
) -> None:
    path = austen_dir / "persuasion.txt"
    config = {"source": str(path), "txt_unit": unit, "labeled": False}
    corpus = load_corpus(CorpusConfig.model_validate(config))
    texts = [document.text for document in corpus.documents(0, len(corpus))]
    assert least < len(texts) < most
    assert sorted(" ".join(texts).split()) == sorted(path.read_text().split())
    # By line as before, so that caches keep their fingerprints.
    assert corpus.identity.get("txt_unit") == (None if unit == "line" else unit)


def test_a_novels_file_is_read_whole(austen_dir: Path) -> None:
    path = austen_dir / "persuasion.txt"
    config = CorpusConfig(source=str(path), txt_unit="document", labeled=False)
    (document,) = load_corpus(config).documents(0, 1)
    assert document.text.split() == path.read_text().split()
