"""WikiText's lines, as its table and its file hold them."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import CorpusConfig, join_articles, load_corpus
from tests.stand_ins import WIKITEXT, write_wikitext

LINES = ["", " = Emma = \n", "", " She was rich . \n", " = = Plot = = \n", "", " Ball . \n", ""]


def test_an_article_is_its_lines_in_the_files_own_form() -> None:
    found = join_articles([*LINES, " = Persuasion = \n", "", " Anne . \n", ""])
    assert found == [
        " \n = Emma = \n \n She was rich . \n = = Plot = = \n \n Ball . \n \n",
        " = Persuasion = \n \n Anne . \n \n",
    ]


@pytest.mark.parametrize(
    "line", [" = = Plot = = \n", " = = = Deep = = = \n", " 1 = 1 \n", " = 2 \n", " = = \n"]
)
def test_what_is_no_title(line: str) -> None:
    assert len(join_articles([*LINES, line, "", " More . \n"])) == 1


def test_a_paragraph_that_looks_like_a_title_is_none() -> None:
    assert len(join_articles([*LINES, " So \n", " = x = \n", " follows . \n"])) == 1


def test_lines_without_breaks_and_nulls_are_the_same() -> None:
    lines = [None if not line else line.rstrip("\n") for line in LINES]
    assert join_articles(lines) == join_articles(LINES)


def test_no_title_is_refused() -> None:
    with pytest.raises(UserError, match="no line is a title"):
        join_articles(["a", "b"])


def test_a_table_and_a_file_give_the_same_documents(tmp_path: Path) -> None:
    folder = write_wikitext(tmp_path / "wikitext")
    rows = datasets.Dataset.from_parquet(str(folder / "test-00000-of-00001.parquet"))
    text = "".join(one or " \n" for one in rows["text"])  # pyright: ignore
    (tmp_path / "wiki.test.txt").write_text(text)
    tables, files = (
        load_corpus(
            CorpusConfig(source=str(source), split=split, labeled=False, txt_unit="article")
        )
        for source, split in ((folder, "test"), (tmp_path / "wiki.test.txt", None))
    )
    assert tables.identity["txt_unit"] == "article"
    found = sorted(one.text for one in tables.documents(0, len(tables)))
    assert len(found) == len(WIKITEXT["test"])
    assert found == sorted(one.text for one in files.documents(0, len(files)))
    assert all(one.strip().startswith("= ") for one in found)


def test_articles_have_no_labels(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\n = A = ,1\n,1\nb,0\n")
    with pytest.raises(UserError, match="which have no labels"):
        load_corpus(CorpusConfig(source=str(file), txt_unit="article"))
