"""Packing: documents laid end to end in sequences, with their borders kept.

A document is tokenised as the tokenizer does it (with the special tokens that it adds, such as a
begin-of-text token) and ends with the tokenizer's end-of-text token, as GPT-2 and its kin were
trained (Radford et al. 2019); unlike there, nothing ever looks across a border: each token carries
the index of its document, and the last token before a border predicts nothing.

Documents stay in order and whole where they fit: the open sequence takes the next document if it
has room for all of it, else a new one begins (next fit). A document longer than a sequence begins a
new one and is cut into pieces of the full length, and the rest of it stays open for the documents
behind. Each piece is read without those before it, as a text that stands alone: what the tokenizer
puts before a text stands before every piece. No other token is dropped or repeated. Cutting only
what must be cut leaves sequences of differing lengths, which cost nothing in a cache, where cutting
at every sequence's end would take context from many documents (Ding et al. 2024, *Fewer Truncations
Improve Language Modeling*, arXiv:2404.10830).

A conversation comes with its tokens, of which some are not learned; it is never cut.

The sequences of some documents depend on these alone, so a shard's depend on no other shard.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL, SAMPLE_ID_BYTES
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.tokenization import token_ids
from teacher_cache.stages.tokens.frame import reads_letters_alone, surroundings, unseen_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_SEQUENCE = 2  # one token and its next
MOST_SEGMENTS = 2**16  # an index of 16 bits names so many
_BATCH_DOCUMENTS = 512

DocumentEnd = Literal["eos", "none"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of one document that stand in one sequence.

    Attributes:
        document_id: 16 bytes.
        start: the first of its document's tokens, special ones included.
        stop: one past the last.
        num_begin: tokens before these, of the begin that stands before each piece.
    """

    document_id: bytes
    start: int
    stop: int
    num_begin: int = 0

    @property
    def num_tokens(self) -> int:
        """In the sequence."""
        return self.num_begin + self.stop - self.start


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSample:
    """One sequence of S tokens: the unit of caching for a language model.

    Attributes:
        input_ids: uint32 [S], no padding.
        segment: uint16 [S], from 0: which piece of this sequence a token belongs to.
        pieces: in order; of one document one at most.
        is_learned: bool [S], the tokens that are to be predicted; None: all.
    """

    input_ids: np.ndarray
    segment: np.ndarray
    pieces: tuple[Piece, ...]
    is_learned: np.ndarray | None = None

    @property
    def sample_id(self) -> bytes:
        """16 bytes that are equal exactly for the same pieces of the same documents."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(piece.document_id)
            digest.update(piece.start.to_bytes(8, "little") + piece.stop.to_bytes(8, "little"))
        return digest.digest()[:SAMPLE_ID_BYTES]

    @property
    def continues(self) -> bool:
        """Whether the first piece goes on with a document that began in the sequence before."""
        return self.pieces[0].start > 0

    @property
    def loss_mask(self) -> np.ndarray:
        """Which positions count, bool [S]: those whose next token is learned, of the same piece."""
        counts = np.zeros(len(self.segment), bool)
        counts[:-1] = self.segment[1:] == self.segment[:-1]
        if self.is_learned is not None:
            counts[:-1] &= self.is_learned[1:]
        return counts

    @property
    def is_spoken(self) -> np.ndarray:
        """At which positions what the teacher says is kept, bool [S].

        Where some tokens are not learned these are the counted ones; else all.
        """
        return np.ones(len(self.segment), bool) if self.is_learned is None else self.loss_mask

    @property
    def position_ids(self) -> np.ndarray:
        """Each token's place in its piece, from 0, int64 [S]."""
        lengths = [piece.num_tokens for piece in self.pieces]
        return np.concatenate([np.arange(length) for length in lengths])


def next_ids(input_ids: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Each position's next token, int64 [S]; `NO_LABEL` where it is of another piece, or none.

    Args:
        input_ids: [S].
        segment: [S], which piece a token belongs to.
    """
    following = np.full(len(input_ids), NO_LABEL, np.int64)
    same = segment[1:] == segment[:-1]
    following[:-1] = np.where(same, input_ids[1:].astype(np.int64), NO_LABEL)
    return following


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Some documents as sequences.

    Attributes:
        samples: in the documents' order.
        num_documents: in them.
        num_empty: documents left out: whitespace only, or the tokenizer leaves nothing of them.
        num_continued: documents in more than one sequence.
        num_begun: documents whose text spells the begin that the tokenizer puts before it, too.
        num_unseen: documents that begin with a space, or have one behind a special token's name,
            that leaves no trace in their tokens.
    """

    samples: list[PackedSample]
    num_documents: int
    num_empty: int
    num_continued: int
    num_begun: int = 0
    num_unseen: int = 0

    @property
    def num_tokens(self) -> int:
        """Of all samples."""
        return sum(len(sample.input_ids) for sample in self.samples)


def packing_version(tokenizer: PreTrainedTokenizerBase) -> int:
    """Of the code of this module, as far as it makes a difference to a tokenizer.

    Up to 1 a piece that goes on had no begin, and did not say that it goes on. That is all the same
    where a letter becomes one token of its own and nothing else.
    """
    return 1 if reads_letters_alone(tokenizer) else 2


def packing_settings(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    document_end: DocumentEnd,
    version: int = 1,
) -> dict[str, Any]:
    """What decides how documents become sequences, for the fingerprint.

    `version` stands for the code of this module and changes with what it makes.
    """
    begin = {} if version == 1 else {"begin_ids": list(surroundings(tokenizer).before)}
    return {
        "version": version,
        "max_length": max_length,
        "document_end": document_end,
        "end_id": _end_id(tokenizer, document_end),
        **begin,
    }


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    document_end: DocumentEnd = "eos",
    version: int | None = None,
) -> Packed:
    """Tokenise documents and pack them into sequences.

    Args:
        documents: of one shard, in order; their labels are not read.
        tokenizer: the teacher's.
        max_length: the most tokens of a sequence.
        document_end: `eos` puts the tokenizer's end-of-text token behind a document that does not
            end with it already, where the tokenizer has one; `none` puts nothing there.
        version: `packing_version` of the tokenizer, or an older one.

    Raises:
        UserError: if `max_length` leaves no room for a token and its next.
    """
    version = packing_version(tokenizer) if version is None else version
    around = surroundings(tokenizer) if version > 1 else None
    has_unseen = _has_unseen_space(tokenizer) if version > 1 else None
    begin = () if around is None else around.before
    shortest = max(SHORTEST_SEQUENCE, len(begin) + 1)
    if max_length < shortest:
        raise UserError(
            f"--max-length {max_length} leaves no room for a token and its next: give at least "
            f"{shortest}"
        )
    end_id = _end_id(tokenizer, document_end)
    chats = [one for one in documents if one.tokens is not None]
    if chats:
        return _packed_conversations(chats, max_length=max_length)
    read: list[tuple[bytes, np.ndarray]] = []
    num_begun = num_unseen = 0
    for document, found in _tokenized(documents, tokenizer, end_id):
        ids = found if around is None else around.with_one_begin(found)
        num_begun += len(ids) < len(found)
        if ids:
            read.append((document.sample_id, np.asarray(ids, np.uint32)))
            num_unseen += has_unseen is not None and has_unseen(document.text)
    return Packed(
        samples=pack_tokens(read, max_length=max_length, begin=begin),
        num_documents=len(read),
        num_empty=len(documents) - len(read),
        num_continued=sum(len(ids) > max_length for _, ids in read),
        num_begun=num_begun,
        num_unseen=num_unseen,
    )


def _packed_conversations(documents: Sequence[Document], *, max_length: int) -> Packed:
    """Conversations have their tokens already, none of which is put around or left out.

    They are no longer than a sample, so each stays whole.
    """
    tokens = [one.tokens for one in documents if one.tokens is not None]
    assert all(len(one.ids) <= max_length for one in tokens), "longer ones are refused before"
    samples = pack_tokens(
        [(one.sample_id, its.ids) for one, its in zip(documents, tokens, strict=True)],
        max_length=max_length,
    )
    learned = [one.is_learned for one in tokens if one.is_learned is not None]
    if learned:
        samples = with_learned(samples, learned)
    return Packed(samples=samples, num_documents=len(tokens), num_empty=0, num_continued=0)


def with_learned(
    samples: Sequence[PackedSample], learned: Sequence[np.ndarray]
) -> list[PackedSample]:
    """Samples that know which of their tokens are to be predicted.

    Args:
        samples: of whole documents, at least one.
        learned: of each document in their order, bool [its tokens].
    """
    ends = np.cumsum([len(one.input_ids) for one in samples])
    parts = np.split(np.concatenate(learned), ends[:-1])
    return [replace(one, is_learned=part) for one, part in zip(samples, parts, strict=True)]


def pack_tokens(
    documents: Sequence[tuple[bytes, np.ndarray]],
    *,
    max_length: int,
    begin: Sequence[int] = (),
) -> list[PackedSample]:
    """Pack token ids by next fit, as this module's head says.

    Args:
        documents: the id (16 bytes) and the token ids, uint32 [T] with T > 0, of each.
        max_length: the most tokens of a sequence.
        begin: less than so many ids, which stand before each piece that goes on; a document has
            its own.
    """
    again = np.asarray(begin, np.uint32)
    samples: list[PackedSample] = []
    pieces: list[Piece] = []
    tokens: list[np.ndarray] = []
    num_tokens = 0
    for document_id, ids in documents:
        stop = 0
        while stop < len(ids):
            start, num_begin = stop, len(again) if stop else 0
            stop = min(len(ids), start + max_length - num_begin)
            part = np.concatenate([again[:num_begin], ids[start:stop]])
            if num_tokens + len(part) > max_length or len(pieces) == MOST_SEGMENTS:
                samples.append(_sample(pieces, tokens))
                pieces, tokens, num_tokens = [], [], 0
            pieces.append(
                Piece(document_id=document_id, start=start, stop=stop, num_begin=num_begin)
            )
            tokens.append(part)
            num_tokens += len(part)
    if pieces:
        samples.append(_sample(pieces, tokens))
    return samples


def _sample(pieces: list[Piece], tokens: list[np.ndarray]) -> PackedSample:
    lengths = [len(part) for part in tokens]
    return PackedSample(
        input_ids=np.concatenate(tokens),
        segment=np.repeat(np.arange(len(pieces), dtype=np.uint16), lengths),
        pieces=tuple(pieces),
    )


def _end_id(tokenizer: PreTrainedTokenizerBase, document_end: DocumentEnd) -> int | None:
    eos_id = tokenizer.eos_token_id if document_end == "eos" else None
    return eos_id if isinstance(eos_id, int) else None


def _has_unseen_space(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool] | None:
    """Whether a text has one space where none is seen; None where each is."""
    names = [name for name, is_special in unseen_spaces(tokenizer).items() if is_special]
    if not names:
        return None
    places = re.compile(f"(?:{'|'.join(re.escape(name) or '^' for name in names)}) (?! )")
    return lambda text: places.search(text) is not None


def _tokenized(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, end_id: int | None
) -> Iterator[tuple[Document, list[int]]]:
    """Documents that are not whitespace only, with their tokens."""
    texts = [document for document in documents if document.text.strip()]
    for start in range(0, len(texts), _BATCH_DOCUMENTS):
        batch = texts[start : start + _BATCH_DOCUMENTS]
        found = token_ids([document.text for document in batch], tokenizer, max_length=None)
        for document, ids in zip(batch, found, strict=True):
            if ids and end_id is not None and ids[-1] != end_id:
                ids = [*ids, end_id]
            yield document, ids


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRow:
    """A packed sample of S tokens as an evaluation reads it, from documents or from a cache.

    Attributes:
        input_ids: uint32 [S].
        segment: [S] the document of each token, ascending.
        loss_mask: bool [S], the positions that count, as in training: those whose next token is of
            the same document.
        continues: whether the first document began in a row before; None where that is not known.
    """

    input_ids: np.ndarray
    segment: np.ndarray
    loss_mask: np.ndarray
    continues: bool | None = None

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
        PackedRow(
            input_ids=one.input_ids,
            segment=one.segment,
            loss_mask=one.loss_mask,
            continues=one.continues,
        )
        for one in pack(documents, tokenizer, max_length=max_length).samples
    ]
