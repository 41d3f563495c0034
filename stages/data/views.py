"""Views: perturbed copies of documents, so that one teacher pass pays for augmentation.

After Tang et al. 2019 (arXiv:1903.12136, section 3.2), as did TinyBERT (Jiao et al. 2020), with the
masking probability of the paper and these departures: a view is of one kind; where the tokenizer
has no mask token, a masked word is dropped; the sampled n-gram is at least a third of the document,
for the one to five words of the paper seldom tell its class; nothing is replaced by its part of
speech, which takes a tagger; and documents are spliced. The teacher labels the views.

Only what the teacher reads of a document is perturbed: a view of a long one would else be the
document itself once it is cut. Of a pair both texts are perturbed in the view's one kind, each by
draws of its own; a spliced one goes on with the same side of the other pair.

A view is a function of the document, its place in the corpus's order, the view's number, the
corpus's seed and how the teacher reads: it is the same in any run, whatever the limits, the shards
and the number of views.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from teacher_cache.cache.plan import viewed_split, views_split
from teacher_cache.stages.data.corpus import PLACE_BYTES, Corpus, Document
from teacher_cache.stages.data.tokenization import Reading

# Recorded with each split of views; `version` stands for the code below and changes with what it
# makes. The seed is the corpus's, which the cache's settings hold.
PERTURBATION: dict[str, Any] = {
    "version": 2,
    "kinds": {"mask": 0.5, "part": 0.25, "splice": 0.25},
    "mask_probability": 0.1,
    "attempts": 10,
}

# A word is what whitespace separates, with the whitespace behind it; where a script is written
# without (Thai, Lao, Burmese, Khmer, Japanese, Chinese), it is one character.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_WORD = re.compile(rf"(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)\s*")

Uniform = Callable[[], float]


@dataclass(frozen=True)
class View(Document):
    """A perturbed document: its source, split and position, another text, and no label.

    Attributes:
        place: the first bytes of the id of the document that it was made from; of two spliced ones
            the smaller. Held out are the ids below a bound, so a view is held out exactly when
            one of its documents is.
    """

    place: bytes = field(kw_only=True)

    @property
    def sample_id(self) -> bytes:
        """`place`, then the start of the hash that a document with this text would have."""
        return self.place + super().sample_id[: -len(self.place)]


@dataclass(frozen=True, eq=False)
class Views:
    """The views of one number, a corpus of their own.

    Attributes:
        corpus: whose documents they are made from.
        number: from 1.
        reading: the teacher's.
    """

    corpus: Corpus
    number: int
    reading: Reading

    def __len__(self) -> int:
        """The number of documents, those without such a view included."""
        return len(self.corpus)

    def documents(self, start: int, stop: int) -> list[View]:
        """The views of documents `start` to `stop` (not included) that have one."""
        made = views_of(self.corpus, start, stop, num=self.number, reading=self.reading)
        return [views[-1] for views in made if views[-1] is not None]


def with_views(
    corpora: Mapping[str, Corpus], num_views: int, reading: Reading
) -> dict[str, Corpus | Views]:
    """The splits of a cache by name: the corpora, and behind them their views."""
    views = {
        views_split(split, number): Views(corpus, number, reading)
        for split, corpus in corpora.items()
        for number in range(1, num_views + 1)
    }
    return {**corpora, **views}


def split_settings(split: str) -> dict[str, Any]:
    """What decides a split's values beside the cache's settings: how its views are made."""
    return PERTURBATION if viewed_split(split) else {}


def views_of(
    corpus: Corpus, start: int, stop: int, *, num: int, reading: Reading
) -> Iterator[list[View | None]]:
    """The first views of each of some documents.

    A document is spliced with an earlier one of the corpus's order: that one is there under any
    limit, and no other shard need be computed to read it.

    Args:
        corpus: with random access.
        start: first document.
        stop: one past the last.
        num: views of each.
        reading: the teacher's.

    Yields:
        `num` views; None for one that is left out, as empty documents have none.
    """
    for idx, document in enumerate(corpus.documents(start, stop), start):

        def earlier(uniform: Uniform, idx: int = idx) -> Document | None:
            chosen = int(uniform() * idx)
            return corpus.documents(chosen, chosen + 1)[0] if idx else None

        yield perturb(document, num, seed=corpus.config.seed, reading=reading, other=earlier)


def perturb(
    document: Document,
    num: int,
    *,
    seed: int,
    reading: Reading,
    other: Callable[[Uniform], Document | None],
) -> list[View | None]:
    """The first views of a document; the teacher reads none like it, nor like another one.

    Args:
        document: of any length.
        num: how many.
        seed: of the run.
        reading: the teacher's.
        other: chooses the document to splice with by a uniform number; None where there is none.

    Returns:
        `num` views; None for one that came out empty or like an earlier one in every attempt.
    """
    nothing = ("",) * len(document.texts)
    seen = {tuple(reading.ids(*texts)) for texts in (nothing, document.texts)}
    sides = _words(document, reading)
    views: list[View | None] = []
    for number in range(1, num + 1):
        key = f"{seed} {number} ".encode() + document.sample_id
        # `random()` is the one method whose numbers Python promises never to change.
        uniform = random.Random(int.from_bytes(hashlib.sha256(key).digest())).random
        view = None
        for _ in range(PERTURBATION["attempts"] if all(sides) else 0):
            candidate = _attempt(document, sides, uniform, reading, other)
            ids = tuple(reading.ids(*candidate.texts))
            if all(candidate.texts) and ids not in seen:
                view = candidate
                seen.add(ids)
                break
        views.append(view)
    return views


def _words(document: Document, reading: Reading) -> list[list[str]]:
    """Of each text, what the teacher reads."""
    return [_WORD.findall(text) for text in reading.cut(*document.texts)]


def _attempt(
    document: Document,
    sides: Sequence[list[str]],
    uniform: Uniform,
    reading: Reading,
    other: Callable[[Uniform], Document | None],
) -> View:
    kinds = PERTURBATION["kinds"]
    kind = uniform()
    place = document.sample_id[:PLACE_BYTES]
    if kind < kinds["mask"]:
        texts = [_masked(words, uniform, reading.mask_token) for words in sides]
    elif kind < kinds["mask"] + kinds["part"]:
        texts = [_part(words, uniform) for words in sides]
    else:
        partner = other(uniform)
        others = _words(partner, reading) if partner else [[] for _ in sides]
        both = zip(sides, others, strict=True)
        texts = [_spliced(words, theirs, uniform) for words, theirs in both]
        if partner:
            place = min(place, partner.sample_id[:PLACE_BYTES])
    return View(
        texts[0],
        document.source,
        document.split,
        document.position,
        second=texts[1] if len(texts) > 1 else None,
        place=place,
    )


def _masked(words: list[str], uniform: Uniform, mask_token: str | None) -> str:
    """Each word is masked with the same probability; nothing where no word would be left."""
    is_masked = [uniform() < PERTURBATION["mask_probability"] for _ in words]
    if all(is_masked):
        return ""
    return "".join(
        word if not masked else "" if mask_token is None else mask_token + _space_behind(word)
        for word, masked in zip(words, is_masked, strict=True)
    ).strip()


def _part(words: list[str], uniform: Uniform) -> str:
    """Successive words, at least a third of them and not all; nothing of a single word."""
    shortest = math.ceil(len(words) / 3)
    length = shortest + int(uniform() * (len(words) - shortest))
    start = int(uniform() * (len(words) - length + 1))
    return "".join(words[start : start + length]).strip() if len(words) > 1 else ""


def _spliced(words: list[str], others: list[str], uniform: Uniform) -> str:
    """The start of one and the end of the other, cut at the same share between 1/3 and 2/3."""
    cut = (1 + uniform()) / 3
    start = "".join(words[: math.ceil(cut * len(words))]).strip()
    return f"{start} {''.join(others[int(cut * len(others)) :])}".strip()


def _space_behind(word: str) -> str:
    return word[len(word.rstrip()) :]
