"""The text that a cache's ids spell, read again with the student's tokenizer.

A cache holds ids, no text; but the ids of a byte-level or SentencePiece tokenizer spell their text
byte for byte (`token_bytes`), so that nothing has to be cached or fetched beside them. What stands
in a sample is a *piece* of a document (`stages.data.packing`): all of it, or a part that begins and
ends with a token of the teacher's, which need not be a whole character.

A *frame* is what a tokenizer puts around a text: a begin of sequence before it, a separator or the
end of text behind it. Frames are no text, on either side: they are taken off the teacher's piece,
and the student's own are put around what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_cache.stages.tokens.byte_bounds import TokenSpans, spans_of_bytes, tokenize_with_spans
from teacher_cache.stages.tokens.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a tokenizer puts around a text.

    Attributes:
        before: ids before it.
        after: ids behind it.
        end_id: of the end of text; None where the tokenizer has none.
        adds_space: whether a text's first token has a space that the text has not.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    end_id: int | None
    adds_space: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, table: TokenBytes) -> Frame:
        """A tokenizer's, as one letter shows it."""
        encoded: Any = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
        ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        first = added.index(0)
        stop = len(added) - added[::-1].index(0)
        end_id = tokenizer.eos_token_id
        return cls(
            before=tuple(ids[:first]),
            after=tuple(ids[stop:]),
            end_id=end_id if isinstance(end_id, int) else None,
            adds_space=(table.content[ids[first]] or b"").startswith(b" "),
        )

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """What may stand behind a text, the longest first; the end of text is in the first ones."""
        end = () if self.end_id is None else (self.end_id,)
        several = ((*self.after, *end), end, self.after)
        return tuple(dict.fromkeys(one for one in several if one))


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A piece of a document as one side reads it.

    Attributes:
        data: its bytes, which need not be whole characters.
        spans: its tokens, frames included, and where they lie in `data`.
        is_exact: bool [S], for a token of text whether its bytes are those that it stands for.
        first: index of the first token of text.
        stop: one past the last.
        has_end: whether the token behind the text is the end of text.
    """

    data: bytes
    spans: TokenSpans
    is_exact: np.ndarray
    first: int
    stop: int
    has_end: bool

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.spans.ids)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One side's tokenizer, its tokens' bytes and its frame."""

    tokenizer: PreTrainedTokenizerBase
    table: TokenBytes
    frame: Frame

    def piece_of_ids(self, ids: np.ndarray, *, begins: bool) -> Piece:
        """What the ids of a piece spell.

        Args:
            ids: [S] of one piece, frames included.
            begins: whether it is known to begin its document; a frame before the text says so too.
        """
        before = self.frame.before
        first = len(before) if before and tuple(ids[: len(before)]) == before else 0
        stop, has_end = len(ids), False
        for ending in self.frame.ends:
            start = len(ids) - len(ending)
            if start >= first and tuple(ids[start:]) == ending:
                stop, has_end = start, ending[-1] == self.frame.end_id
                break
        contents = [self.table.content[int(one)] or b"" for one in ids[first:stop]]
        drops = self.frame.adds_space and (begins or first > 0) and bool(contents)
        if drops and contents[0].startswith(b" "):
            contents[0] = contents[0][1:]
        return self._framed(
            ids[:first],
            ids[first:stop],
            np.cumsum([0, *map(len, contents)], dtype=np.int64),
            ids[stop:],
            data=b"".join(contents),
            has_end=has_end,
        )

    def piece_of_bytes(self, data: bytes, *, has_end: bool) -> Piece:
        """Tokenize bytes as this side does, its frame around them.

        Bytes that are no characters get the tokens of single bytes, where the tokenizer has them,
        else its token for what is unknown, else none.

        Args:
            data: of the piece.
            has_end: whether to put the end of text behind it.
        """
        ids: list[int] = []
        bounds, start = [0], 0
        for run in _runs(data):
            spans = self._bytes(run) if isinstance(run, bytes) else self._text(run)
            inner = spans.is_text
            ids += spans.ids[inner].tolist()
            bounds += (start + spans.bounds[1:][inner]).tolist()
            start += len(run if isinstance(run, bytes) else run.encode())
        end = () if self.frame.end_id is None or not has_end else (self.frame.end_id,)
        after = self.frame.after if self.frame.after[-1:] == end else (*self.frame.after, *end)
        return self._framed(
            self.frame.before, ids, np.array(bounds), after, data=data, has_end=bool(end)
        )

    def _text(self, text: str) -> TokenSpans:
        return tokenize_with_spans([text], self.tokenizer, self.table)[0]

    def _bytes(self, data: bytes) -> TokenSpans:
        found = [self._byte_ids.get(byte, self._unknown_id) for byte in data]
        known = [(idx, one) for idx, one in enumerate(found) if one is not None]
        if not known:
            return spans_of_bytes([], self.table)
        bounds = [0, *(idx for idx, _ in known[1:]), len(data)]
        return TokenSpans(
            ids=np.array([one for _, one in known], dtype=np.int64),
            bounds=np.array(bounds, dtype=np.int64),
            is_text=np.ones(len(known), dtype=bool),
        )

    @property
    def _unknown_id(self) -> int | None:
        unknown = self.tokenizer.unk_token_id
        return unknown if isinstance(unknown, int) else None

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Ids of single bytes."""
        return {
            content[0]: token_id
            for token_id, content in enumerate(self.table.content)
            if content is not None and len(content) == 1 and token_id not in self.table.added
        }

    def _framed(
        self,
        before: Sequence[int] | np.ndarray,
        ids: Sequence[int] | np.ndarray,
        bounds: np.ndarray,
        after: Sequence[int] | np.ndarray,
        *,
        data: bytes,
        has_end: bool,
    ) -> Piece:
        first, stop = len(before), len(before) + len(ids)
        whole = np.concatenate([before, ids, after]).astype(np.int64)
        is_text = np.zeros(len(whole), dtype=bool)
        is_text[first:stop] = True
        is_exact = np.zeros(len(whole), dtype=bool)
        is_exact[first:stop] = [
            self.table.content[int(one)] == data[start:end]
            for one, start, end in zip(ids, bounds[:-1], bounds[1:], strict=True)
        ]
        spans = TokenSpans(
            ids=whole,
            bounds=np.concatenate([[bounds[0]] * first, bounds, [bounds[-1]] * len(after)]),
            is_text=is_text,
        )
        return Piece(
            data=data, spans=spans, is_exact=is_exact, first=first, stop=stop, has_end=has_end
        )


def _runs(data: bytes) -> Iterator[str | bytes]:
    """The text of whole characters, and between it the bytes that are none."""
    rest = data
    while rest:
        try:
            yield rest.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield rest[: error.start].decode()
            yield rest[error.start : error.end]
            rest = rest[error.end :]
