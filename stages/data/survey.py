"""What is in a corpus, counted before anything is spent on it."""

from __future__ import annotations

import hashlib

from pydantic import Field

from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.data.corpus import Corpus

_CHUNK_DOCUMENTS = 4096


class CorpusReport(StageConfig):
    """Counts over a corpus, its limit applied."""

    num_documents: int = Field(description="all documents")
    num_empty: int = Field(description="whitespace only: left out of the samples")
    num_duplicates: int = Field(description="not empty, and the text of an earlier document: kept")
    label_counts: dict[str, int] | None = Field(
        default=None, description="documents by class name or integer, None without labels"
    )

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.num_documents:,} documents"]
        if self.label_counts is not None:
            listed = ", ".join(f"{count:,} {name}" for name, count in self.label_counts.items())
            parts[0] += f" ({listed})"
        if self.num_empty:
            parts.append(f"{self.num_empty:,} empty (left out)")
        if self.num_duplicates:
            parts.append(f"{self.num_duplicates:,} duplicates (kept)")
        return ", ".join(parts)


def survey(corpus: Corpus) -> CorpusReport:
    """Read every text once and count the empty and the repeated ones."""
    seen: set[bytes] = set()
    num_empty = num_duplicates = 0
    for start in range(0, len(corpus), _CHUNK_DOCUMENTS):
        for document in corpus.documents(start, min(start + _CHUNK_DOCUMENTS, len(corpus))):
            if not document.text.strip():
                num_empty += 1
                continue
            digest = hashlib.sha256(document.text.encode("utf-8")).digest()[:16]
            num_duplicates += digest in seen
            seen.add(digest)
    return CorpusReport(
        num_documents=len(corpus),
        num_empty=num_empty,
        num_duplicates=num_duplicates,
        label_counts=corpus.label_counts(),
    )
