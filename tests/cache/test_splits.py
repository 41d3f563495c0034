from __future__ import annotations

import pytest

from teacher_cache.cache.plan import is_split, viewed_split, views_split


@pytest.mark.parametrize("corpus", ["labeled", "unlabeled"])
@pytest.mark.parametrize("number", [1, 2, 10, 300])
def test_views_name_their_corpus(corpus: str, number: int) -> None:
    name = views_split(corpus, number)
    assert viewed_split(name) == corpus and viewed_split(corpus) is None
    assert is_split(name) and is_split(corpus)


@pytest.mark.parametrize(
    "name", ["", "index", "teacher", "labeled_views", "labeled_views_0", "labeled_views_1x", "x"]
)
def test_other_folders_are_no_splits(name: str) -> None:
    assert not is_split(name) and viewed_split(name) is None
