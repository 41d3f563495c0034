"""Before anything is trained: is a text that will judge among those that are learned from?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.tokenization import Reading
from teacher_cache.stages.data.views import views_of


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many texts of one part coincide with a held-out text.

    Attributes:
        part: what is learned from: a corpus's part, or the views of one.
        held_out: what it was compared with.
        num_texts: of the part.
        num_exact: of them the very same as a held-out one.
        num_normalised: of them the same after `normalised`, exact ones included.
    """

    part: str
    held_out: str
    num_texts: int
    num_exact: int
    num_normalised: int


def normalised(text: str) -> str:
    """The text's letters and digits, case folded, with one space for any whitespace."""
    kept = (char for char in text.casefold() if char.isalnum() or char.isspace())
    return " ".join("".join(kept).split())


def overlap(part: str, texts: Sequence[str], held_out: str, judged: Iterable[str]) -> Overlap:
    """Compare two sets of texts by their SHA-256.

    Texts that are nothing but punctuation count as the same only if they are so exactly.

    Args:
        part: the first one's name.
        texts: that are learned from.
        held_out: the second one's name.
        judged: its texts.
    """
    exact: set[str] = set()
    folded: set[str] = set()
    for text in judged:
        exact.add(_digest(text))
        folded.add(_digest(normalised(text) or text))
    return Overlap(
        part=part,
        held_out=held_out,
        num_texts=len(texts),
        num_exact=sum(_digest(text) in exact for text in texts),
        num_normalised=sum(_digest(normalised(text) or text) in folded for text in texts),
    )


def check(
    parts: Mapping[str, Sequence[str]], held_out: Mapping[str, Sequence[str]]
) -> list[Overlap]:
    """Compare every part that is learned from with every held-out one.

    Args:
        parts: texts by name.
        held_out: texts by name.

    Raises:
        CheckFailed: if any held-out text is learned from, exactly or normalised.
    """
    found = [
        overlap(part, texts, name, judged)
        for part, texts in parts.items()
        for name, judged in held_out.items()
    ]
    for one in found:
        if one.num_normalised:
            raise CheckFailed(
                f"{one.num_normalised} of the {one.num_texts:,} texts of {one.part} are texts of "
                f"{one.held_out} ({one.num_exact} exactly, the rest but for case and punctuation), "
                "expected none: the corpora are not apart, so nothing was trained"
            )
    return found


def view_overlaps(
    corpora: Mapping[str, CorpusConfig],
    held_out: Mapping[str, Sequence[str]],
    *,
    num_views: int,
    reading: Reading,
) -> list[Overlap]:
    """Count the views that coincide with a held-out text; a short one may do so by chance.

    Args:
        corpora: whose views are cached, by name.
        held_out: texts by name.
        num_views: of each document.
        reading: the teacher's.
    """
    found: list[Overlap] = []
    for name, config in corpora.items():
        corpus = load_corpus(config)
        made = views_of(corpus, 0, len(corpus), num=num_views, reading=reading)
        texts = [view.text for views in made for view in views if view is not None]
        found += [overlap(f"views of {name}", texts, *judged) for judged in held_out.items()]
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
