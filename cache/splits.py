"""The names of a cache's splits: the two corpora, and the views of each by their number.

`labeled_views_2` holds the second view of every labelled document: one split for each number, cut
into the shards of its corpus, so that a cache gains views without touching a shard that it has.
"""

from __future__ import annotations

import re

LABELED, UNLABELED = "labeled", "unlabeled"

_SPLIT = re.compile(rf"({LABELED}|{UNLABELED})(?:_views_([1-9][0-9]*))?")


def views_split(split: str, number: int) -> str:
    """The split of the views of that number (from 1) of a corpus's documents."""
    return f"{split}_views_{number}"


def viewed_split(split: str) -> str | None:
    """The split whose documents these are views of; None for a corpus."""
    found = _SPLIT.fullmatch(split)
    return found[1] if found and found[2] else None


def is_split(name: str) -> bool:
    """Whether a folder of this name is a split's."""
    return _SPLIT.fullmatch(name) is not None
