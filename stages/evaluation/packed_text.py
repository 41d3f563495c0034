"""Packed samples as an evaluation reads them, from documents or from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Corpus
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.data.packing import pack
from teacher_cache.stages.tokens.token_bytes import token_bytes


def documents_with_text(corpus: Corpus) -> list[Document]:
    """The documents that are not empty.

    Raises:
        UserError: if all are.
    """
    documents = [one for one in corpus.documents(0, len(corpus)) if one.text.strip()]
    if not documents:
        raise UserError(
            f"the {len(corpus)} documents of {corpus.config.source} are all empty: check "
            "--text-column"
        )
    return documents


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRow:
    """One packed sample of S tokens.

    Attributes:
        input_ids: uint32 [S].
        segment: [S] the document of each token, ascending.
        loss_mask: bool [S], the positions that count, as in training: those whose next token is of
            the same document.
    """

    input_ids: np.ndarray
    segment: np.ndarray
    loss_mask: np.ndarray

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, in order."""
        starts = np.flatnonzero(np.diff(self.segment)) + 1
        return np.diff(starts, prepend=0, append=len(self.segment)).tolist()

    @property
    def next_ids(self) -> np.ndarray:
        """The next token of each position that counts, int64 [N]."""
        return self.input_ids[1:][self.loss_mask[:-1]].astype(np.int64)


def packed_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[PackedRow]:
    """Documents packed as stage one packs a shard of them.

    Raises:
        UserError: if `max_length` leaves no room for a token and its next.
    """
    return [
        PackedRow(input_ids=one.input_ids, segment=one.segment, loss_mask=one.loss_mask)
        for one in pack(documents, tokenizer, max_length=max_length).samples
    ]


def num_bytes_by_id(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, str | None]:
    """Bytes of text that each id stands for, int64 [V]; 0 of special tokens, which are no text.

    Returns:
        The numbers, and what is not exact about them; None where all are.

    Raises:
        UserError: for a tokenizer that does not tell.
    """
    table = token_bytes(tokenizer)
    special = set(tokenizer.all_special_ids)
    sizes = [
        0 if content is None or token_id in special else len(content)
        for token_id, content in enumerate(table.content)
    ]
    return np.array(sizes, np.int64), table.caveat
