"""What is in a corpus, counted before anything is spent on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from teacher_cache.cache.plan import views_split
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.data.corpus import Corpus, Document
from teacher_cache.stages.data.tokenization import Reading
from teacher_cache.stages.data.views import views_of

_CHUNK_DOCUMENTS = 4096


class CorpusReport(StageConfig):
    """Counts over a corpus, its limit applied."""

    num_documents: int = Field(description="all documents")
    num_empty: int = Field(description="whitespace only: left out of the samples")
    num_duplicates: int = Field(description="not empty, and the text of an earlier document: kept")
    num_unchanged: int = Field(
        default=0,
        description="of views: not empty, and without a view that differs from the document and "
        "from its earlier views: left out",
    )
    label_counts: dict[str, int] | None = Field(
        default=None, description="documents by class name or integer, None without labels"
    )
    num_without_label: int = Field(
        default=0, description="of a labelled corpus, documents that the teacher alone speaks of"
    )
    num_dropped: int = Field(
        default=0, description="without a label and left out, of the source whatever the limit"
    )
    longest: int = Field(default=0, description="characters of the longest document; 0 of views")
    conversations: dict[str, Any] | None = Field(
        default=None,
        exclude_if=lambda found: found is None,  # reports of texts stay as they were
        description="of conversations, what was read, left out and is remarkable",
    )

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.num_documents:,} documents"]
        if self.label_counts:
            listed = ", ".join(f"{count:,} {name}" for name, count in self.label_counts.items())
            parts[0] += f" ({listed})"
        if self.num_without_label:
            parts.append(f"{self.num_without_label:,} without label (kept for the teacher alone)")
        if self.num_dropped:
            parts.append(f"{self.num_dropped:,} more without label (left out)")
        if self.num_empty:
            parts.append(f"{self.num_empty:,} empty (left out)")
        if self.num_duplicates:
            parts.append(f"{self.num_duplicates:,} duplicates (kept)")
        if self.num_unchanged:
            parts.append(f"{self.num_unchanged:,} without another such view (left out)")
        if self.longest:
            parts.append(f"the longest of {self.longest:,} characters")
        return ", ".join(parts)


def survey(corpus: Corpus) -> CorpusReport:
    """Read every text once and count the empty and the repeated ones."""
    texts, counts = _Texts(), corpus.label_counts()
    for start in range(0, len(corpus), _CHUNK_DOCUMENTS):
        for document in corpus.documents(start, min(start + _CHUNK_DOCUMENTS, len(corpus))):
            texts.add(document)
    return CorpusReport(
        num_documents=len(corpus),
        num_empty=len(corpus) - texts.num,
        num_duplicates=texts.num_duplicates,
        label_counts=counts,
        num_without_label=corpus.num_without_label,
        num_dropped=corpus.num_dropped,
        longest=texts.longest,
        conversations=None if corpus.chat_counts is None else corpus.chat_counts.to_json(),
    )


def survey_splits(
    corpora: Mapping[str, Corpus], num_views: int, reading: Reading
) -> dict[str, CorpusReport]:
    """The reports on the corpora and on their views, by the names of their splits.

    Args:
        corpora: by split.
        num_views: of each document.
        reading: the teacher's.
    """
    reports = {split: survey(corpus) for split, corpus in corpora.items()}
    for split, corpus in corpora.items():
        views = [_Texts() for _ in range(num_views)]
        if views:
            for made in views_of(corpus, 0, len(corpus), num=num_views, reading=reading):
                for texts, view in zip(views, made, strict=True):
                    if view is not None:
                        texts.add(view)
        num_empty = reports[split].num_empty
        for number, texts in enumerate(views, 1):
            reports[views_split(split, number)] = CorpusReport(
                num_documents=len(corpus),
                num_empty=num_empty,
                num_duplicates=texts.num_duplicates,
                num_unchanged=len(corpus) - num_empty - texts.num,
            )
    return reports


@dataclass
class _Texts:
    """Counts texts that are not empty, and those that were there before."""

    num: int = 0
    num_duplicates: int = 0
    longest: int = 0
    _seen: set[bytes] = field(default_factory=set)

    def add(self, document: Document) -> None:
        if document.is_empty:
            return
        text = "\0".join(document.texts)
        digest = hashlib.sha256(text.encode("utf-8")).digest()[:16]
        self.num += 1
        self.longest = max(self.longest, sum(map(len, document.texts)))
        self.num_duplicates += digest in self._seen
        self._seen.add(digest)
