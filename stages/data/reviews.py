"""Movie reviews that come inside a package: the demo's data, split by movie.

Short snippets labelled `rotten` or `fresh`, and plots of movies. A movie is in one split only, so
nothing about a held-out movie is learned from. The texts are their authors' and stay out of the
repository.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import datasets
import numpy as np

from teacher_cache.stages.data.local_files import content_hash, read_files
from teacher_cache.stages.data.packages import fetch

NAME = "reviews"
SPLITS = ("train", "validation", "test", "unlabeled", "train-all")
LABEL_NAMES = ("rotten", "fresh")
NUM_TEST_MOVIES = 100
NUM_VALIDATION_MOVIES = 50
NUM_STRIPPED_MOVIES = 120

_Row = dict[str, str]


def read_reviews(split: str) -> tuple[datasets.Dataset, str]:
    """Read one split of the reviews.

    Splits: `train`; `validation` and `test`, movies that are in no other split but `train-all`
    for validation; `unlabeled`, the plots of all movies outside validation and test and the
    reviews of training movies whose labels are not shown; `train-all`, every review outside test.

    Args:
        split: one of `SPLITS`.

    Returns:
        The table (`text`, and `label` but for `unlabeled`), and the SHA-256 of the file it is
        from.

    Raises:
        UserError: if the package cannot be fetched.
    """
    path = fetch(NAME) / "reviews.csv.bz2"
    digest = content_hash([path])
    reviews, plots = _reviews_and_plots(read_files([path], digest).to_list())
    movies = shuffled_movies(reviews)
    test, validation, _, stripped = _partition(movies)
    if split == "unlabeled":
        rows = _outside(plots, {*test, *validation}) + _inside(reviews, stripped)
        return datasets.Dataset.from_dict({"text": [row["text"] for row in rows]}), digest
    rows = {
        "train": _outside(reviews, {*test, *validation, *stripped}),
        "validation": _inside(reviews, validation),
        "test": _inside(reviews, test),
        "train-all": _outside(reviews, test),
    }[split]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABEL_NAMES))}
    )
    columns = {
        "text": [row["text"] for row in rows],
        "label": [LABEL_NAMES.index(row["category"]) for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features), digest


def shuffled_movies(reviews: Sequence[_Row]) -> list[str]:
    """Every reviewed movie once, in the published order: sorted, then shuffled with seed 0."""
    movies = sorted({row["movie_name"] for row in reviews})
    np.random.RandomState(0).shuffle(movies)
    return movies


def _partition(movies: Sequence[str]) -> tuple[set[str], set[str], set[str], set[str]]:
    """Test, validation, labelled and label-stripped movies."""
    first_training = NUM_TEST_MOVIES + NUM_VALIDATION_MOVIES
    return (
        set(movies[:NUM_TEST_MOVIES]),
        set(movies[NUM_TEST_MOVIES:first_training]),
        set(movies[first_training:-NUM_STRIPPED_MOVIES]),
        set(movies[-NUM_STRIPPED_MOVIES:]),
    )


def _reviews_and_plots(rows: Sequence[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Non-empty rows, of each text the first; a text never is in both lists."""
    seen: set[str] = set()
    reviews: list[_Row] = []
    plots: list[_Row] = []
    for wanted, kept in ((False, reviews), (True, plots)):
        for row in rows:
            text = row["text"] or ""
            if (row["category"] == "plot") is wanted and text.strip() and text not in seen:
                seen.add(text)
                kept.append(row)
    return reviews, plots


def _inside(rows: Sequence[_Row], movies: Collection[str]) -> list[_Row]:
    return [row for row in rows if row["movie_name"] in movies]


def _outside(rows: Sequence[_Row], movies: Collection[str]) -> list[_Row]:
    return [row for row in rows if row["movie_name"] not in movies]
