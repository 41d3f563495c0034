"""Movie reviews that come inside a package: the demo's data, split by movie.

Short snippets labelled `rotten` or `fresh`, and plots of movies. A movie is in one split only, so
nothing about a held-out movie is learned from. The texts are their authors' and stay out of the
repository.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from teacher_cache.stages.data.opening import content_hash
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.data.tables import Format, table_of

NAME = "reviews"
SPLITS = ("train", "validation", "test", "unlabeled", "train-all")
LABEL_NAMES = ("rotten", "fresh")
NUM_TEST_MOVIES = 100
NUM_VALIDATION_MOVIES = 50
NUM_STRIPPED_MOVIES = 120

Row = dict[str, str]  # of the package's table: category, text, movie_name


@dataclass(frozen=True, kw_only=True)
class PackagedRows:
    """What the package holds, empty and repeated texts left out.

    Attributes:
        reviews: of each text the first row; `category` is one of `LABEL_NAMES`.
        plots: likewise; no text is in both lists.
        movies: every reviewed movie once, in the published order.
        sha256: of the file that they are from.
    """

    reviews: list[Row]
    plots: list[Row]
    movies: list[str]
    sha256: str


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
    packaged = read_rows()
    reviews, digest = packaged.reviews, packaged.sha256
    test, validation, _, stripped = _partition(packaged.movies)
    if split == "unlabeled":
        rows = outside(packaged.plots, {*test, *validation}) + inside(reviews, stripped)
        return datasets.Dataset.from_dict({"text": [row["text"] for row in rows]}), digest
    rows = {
        "train": outside(reviews, {*test, *validation, *stripped}),
        "validation": inside(reviews, validation),
        "test": inside(reviews, test),
        "train-all": outside(reviews, test),
    }[split]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(LABEL_NAMES))}
    )
    columns = {
        "text": [row["text"] for row in rows],
        "label": [LABEL_NAMES.index(row["category"]) for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features), digest


def read_rows() -> PackagedRows:
    """Read the package's reviews and plots with their movies, for splits of one's own.

    Raises:
        UserError: if the package cannot be fetched.
    """
    path = fetch(NAME) / "reviews.csv.bz2"
    digest = content_hash([path])
    rows = table_of([path], ".csv", Format()).read(("category", "text", "movie_name"), digest)
    reviews, plots = _reviews_and_plots(rows.to_list())
    return PackagedRows(
        reviews=reviews, plots=plots, movies=shuffled_movies(reviews), sha256=digest
    )


def inside(rows: Sequence[Row], movies: Collection[str]) -> list[Row]:
    """The rows of these movies."""
    return [row for row in rows if row["movie_name"] in movies]


def outside(rows: Sequence[Row], movies: Collection[str]) -> list[Row]:
    """The rows of all other movies."""
    return [row for row in rows if row["movie_name"] not in movies]


def shuffled_movies(reviews: Sequence[Row]) -> list[str]:
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


def _reviews_and_plots(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Non-empty rows, of each text the first; a text never is in both lists."""
    seen: set[str] = set()
    reviews: list[Row] = []
    plots: list[Row] = []
    for wanted, kept in ((False, reviews), (True, plots)):
        for row in rows:
            text = row["text"] or ""
            if (row["category"] == "plot") is wanted and text.strip() and text not in seen:
                seen.add(text)
                kept.append(row)
    return reviews, plots
