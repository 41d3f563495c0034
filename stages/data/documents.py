"""A document: a text with its place in a source and, where there is one, its label."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from teacher_cache.cache.schema import SAMPLE_ID_BYTES

# What of an id decides whether its sample is held out.
PLACE_BYTES = 8


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: as the source holds it.
        source: a packaged or hub name with its revision, or a content hash; never a path.
        split: the split it was read from.
        position: its index in that split, before any shuffling or limit.
        label: the class id, None in an unlabelled corpus.
    """

    text: str
    source: str
    split: str
    position: int
    label: int | None = None

    @property
    def sample_id(self) -> bytes:
        """16 bytes that stay the same on every machine, in any order and under any limit.

        Each part is hashed with its length in front, so no two different documents are encoded
        alike: the start of SHA-256 over source, split, position and text.
        """
        digest = hashlib.sha256()
        for part in (self.source, self.split, str(self.position), self.text):
            encoded = part.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.digest()[:SAMPLE_ID_BYTES]
