"""Corpora of movie reviews split by movie, written as the files that the product reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.distillation.rows import Block
from benchmarks.distillation.scale import Scale
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.data.packaged.reviews import (
    LABEL_NAMES,
    PackagedRows,
    Row,
    inside,
    outside,
    read_rows,
)

Name = str  # tuning, full or scarce
Stage = Literal["tuning", "final"]

# What a block's rows learn from and are judged by, when their settings are chosen and at the end.
CORPUS_OF: dict[tuple[Block, Stage], Name] = {
    ("main", "tuning"): "tuning",
    ("main", "final"): "full",
    ("scarce", "final"): "scarce",
    ("long", "final"): "full",
}
SCARCE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class MovieCorpus:
    """One corpus in three parts; no movie of `held_out` is in the other two.

    Attributes:
        name: which one.
        held_out_split: `validation` or `test`.
        train: reviews with their labels.
        unlabeled: texts whose labels are not shown, or that have none.
        held_out: reviews that judge.
    """

    name: Name
    held_out_split: Literal["validation", "test"]
    train: list[Row]
    unlabeled: list[Row]
    held_out: list[Row]

    def write(self, folder: Path) -> None:
        """Write each part as a jsonl file called like its split."""
        for split, rows, labeled in (
            ("train", self.train, True),
            ("unlabeled", self.unlabeled, False),
            (self.held_out_split, self.held_out, True),
        ):
            lines = [json.dumps(_as_json(row, labeled=labeled)) for row in rows]
            write_bytes_atomically(folder / f"{split}.jsonl", ("\n".join(lines) + "\n").encode())


def read_corpora(scale: Scale) -> dict[Name, MovieCorpus]:
    """All corpora, by name; `scale` says how many movies they take."""
    packaged = read_rows()
    tuning, full = _tuning(packaged, scale), _full(packaged, scale)
    return {
        "tuning": tuning,
        "full": full,
        "scarce": _scarce(full, scale.num_scarce),
    }


def block_of(corpus: Name) -> Block:
    """The block whose rows learn from a corpus."""
    return next(key[0] for key, name in CORPUS_OF.items() if name == corpus)


def corpus_config(folder: Path, split: str) -> CorpusConfig:
    """What the product's loader is told to read one part of a written corpus."""
    labeled = split != "unlabeled"
    return CorpusConfig(
        source=str(folder),
        split=split,
        text_column="text",
        label_column="label" if labeled else None,
        labeled=labeled,
        label_names=LABEL_NAMES if labeled else None,
    )


def _tuning(packaged: PackagedRows, scale: Scale) -> MovieCorpus:
    test, validation = _judging_movies(packaged, scale)
    return MovieCorpus(
        name="tuning",
        held_out_split="validation",
        train=_learned(packaged.reviews, test | validation, packaged, scale),
        unlabeled=_learned(packaged.plots, test | validation, packaged, scale),
        held_out=inside(packaged.reviews, validation),
    )


def _full(packaged: PackagedRows, scale: Scale) -> MovieCorpus:
    test, _ = _judging_movies(packaged, scale)
    return MovieCorpus(
        name="full",
        held_out_split="test",
        train=_learned(packaged.reviews, test, packaged, scale),
        unlabeled=_learned(packaged.plots, test, packaged, scale),
        held_out=inside(packaged.reviews, test),
    )


def _judging_movies(packaged: PackagedRows, scale: Scale) -> tuple[set[str], set[str]]:
    """The movies to test on and those to validate on."""
    num_test, num_both = scale.num_test_movies, scale.num_test_movies + scale.num_validation_movies
    return set(packaged.movies[:num_test]), set(packaged.movies[num_test:num_both])


def _learned(rows: list[Row], judging: set[str], packaged: PackagedRows, scale: Scale) -> list[Row]:
    """The rows of movies that do not judge, reviewed or not; fewer at a small scale."""
    found = outside(rows, judging)
    if scale.num_training_movies is None:
        return found
    others = [movie for movie in packaged.movies if movie not in judging]
    return inside(found, others[: scale.num_training_movies])


def _scarce(whole: MovieCorpus, num_labels: int) -> MovieCorpus:
    """A random choice of the labels; the other reviews come first among the unlabelled texts."""
    # RandomState's streams never change between numpy versions, unlike Generator's.
    order = np.random.RandomState(SCARCE_SEED).permutation(len(whole.train))
    chosen = set(order[:num_labels].tolist())
    kept = [row for idx, row in enumerate(whole.train) if idx in chosen]
    stripped = [row for idx, row in enumerate(whole.train) if idx not in chosen]
    return MovieCorpus(
        name="scarce",
        held_out_split=whole.held_out_split,
        train=kept,
        unlabeled=stripped + whole.unlabeled,
        held_out=whole.held_out,
    )


def _as_json(row: Row, *, labeled: bool) -> dict[str, str]:
    label = {"label": row["category"]} if labeled else {}
    return {"text": row["text"], "movie": row["movie_name"]} | label
