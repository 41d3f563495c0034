"""The text that a cache's ids spell, read again with the student's tokenizer.

A cache holds ids, no text; but the ids of a byte-level or SentencePiece tokenizer spell their text
byte for byte (`token_bytes`), so that nothing has to be cached or fetched beside them. What stands
in a sample is a *piece* of a document (`stages.data.packing`): all of it, or a part that begins and
ends with a token of the teacher's, which need not be a whole character.

Frames are no text, on either side (`stages.tokens.frame`): they are taken off the teacher's piece,
and the student's own are put around what is left, the one behind it where the document ends. Nor is
a token for what is unknown: what it stood for is lost, so the text goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from teacher_cache.stages.tokens.byte_bounds import TokenSpans, spans_of_bytes, tokenize_with_spans
from teacher_cache.stages.tokens.frame import Frame, unseen_spaces
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What some tokenizers change, each with a text that shows it.
_CHANGES = {
    "capital letters": "aBa",
    "accents": "aéa",
    "runs of spaces": "a   a",
    "spaces at the ends": "  a  ",
    "line breaks": "a\na",
    "tabs": "a\ta",
    "combining marks": "ae\u0301a",
    "wide and joined letters": "a\uff21\ufb01a",
    "some characters": "a{~<}日🚀߷a",
}

_NUM_SHOWN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A piece of a document as one side reads it.

    Attributes:
        data: its bytes, which need not be whole characters.
        spans: its tokens, frames included, and where they lie in `data`.
        is_exact: bool [S], for a token of text whether its bytes are those that it stands for, and
            no other outcome: an end of text that the text spells is none.
        is_spelt: bool [S], whether its bytes are the text's, but for the space that a tokenizer
            puts before one.
        first: index of the first token of text.
        stop: one past the last.
        has_end: whether its document ends with it.
        has_end_token: whether the token behind the text is the end of text.
        num_added: bytes that the tokens spell beyond `data`: the spaces put before a text and
            behind tokens in it.
        num_unknown: tokens for what the tokenizer does not know.
    """

    data: bytes
    spans: TokenSpans
    is_exact: np.ndarray
    is_spelt: np.ndarray
    first: int
    stop: int
    has_end: bool
    has_end_token: bool
    num_added: int
    num_unknown: int

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.spans.ids)

    @property
    def num_predicted_bytes(self) -> int:
        """Bytes of the tokens of text that some position predicts: of all but a piece's first."""
        first = 0 if self.first else self.spans.bounds[min(1, len(self))]
        return int(self.spans.bounds[-1] - first)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One side's tokenizer, its tokens' bytes and its frame."""

    tokenizer: PreTrainedTokenizerBase
    table: TokenBytes
    frame: Frame

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Reader:
        """A tokenizer's.

        Raises:
            UserError: where the bytes of its tokens are not known.
        """
        table = token_bytes(tokenizer)
        return cls(tokenizer=tokenizer, table=table, frame=Frame.of(tokenizer, table))

    @cached_property
    def caveat(self) -> str | None:
        """What the tokens do not keep of a text; None where it comes back byte for byte."""
        kept = {
            name: self.piece_of_ids(self._text(text).ids, begins=True).data == text.encode()
            for name, text in _CHANGES.items()
        }
        lost = [name for name, is_kept in kept.items() if not is_kept]
        hiding = unseen_spaces(self.tokenizer)
        greedy = [
            repr(token.content)
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.lstrip or token.rstrip or hiding.get(token.content) is False
        ]
        if greedy:
            shown = " ".join(greedy[:_NUM_SHOWN]) + (" ..." if greedy[_NUM_SHOWN:] else "")
            lost.append(f"white space beside {shown}")
        loss = f"the tokens do not keep {', '.join(lost)} as they are" if lost else None
        return "; ".join(filter(None, (self.table.caveat, loss))) or None

    def piece_of_ids(self, ids: np.ndarray, *, begins: bool | None) -> Piece:
        """What the ids of a piece spell.

        Args:
            ids: [S] of one piece, frames included.
            begins: whether it begins its document; None where that is not known, and a frame before
                the text is taken to say so.
        """
        before = self.frame.before
        first = len(before) if before and tuple(ids[: len(before)]) == before else 0
        stop, ending = len(ids), ()
        for one in self.frame.ends:
            start = len(ids) - len(one)
            if start >= first and tuple(ids[start:]) == one:
                stop, ending = start, one
                break
        inner = ids[first:stop].tolist()
        contents = [self.table.content[one] or b"" for one in inner]
        is_added = self.frame.added_spaces(
            inner, contents, begins=first > 0 if begins is None else begins
        )
        for idx in np.flatnonzero(is_added).tolist():
            contents[idx] = contents[idx][1:]
        return self._framed(
            ids[:first],
            inner,
            np.cumsum([0, *map(len, contents)], dtype=np.int64),
            ids[stop:],
            data=b"".join(contents),
            num_added=int(is_added.sum()),
            has_end=bool(ending),
            has_end_token=ending[-1:] == (self.frame.end_id,),
        )

    def piece_of_bytes(self, data: bytes, *, has_end: bool) -> Piece:
        """Tokenize bytes as this side does, its frame around them.

        Bytes that are no characters get the tokens of single bytes, where the tokenizer has them,
        else its token for what is unknown, else none.

        Args:
            data: of the piece.
            has_end: whether its document ends with it, so that what the tokenizer puts behind a
                text and the end of text stand there.
        """
        ids: list[int] = []
        bounds, start = [0], 0
        for run in _runs(data):
            spans = self._bytes(run) if isinstance(run, bytes) else self._text(run)
            inner = spans.is_text
            ids += spans.ids[inner].tolist()
            bounds += (start + spans.bounds[1:][inner]).tolist()
            start += len(run if isinstance(run, bytes) else run.encode())
        before = self.frame.before
        if before and tuple(ids[: len(before)]) == before:
            before = ()  # the text spells it itself
        end = () if self.frame.end_id is None or not has_end else (self.frame.end_id,)
        after = self.frame.after if has_end else ()
        if after[-1:] != end:
            after = (*after, *end)
        return self._framed(
            before,
            ids,
            np.array(bounds, dtype=np.int64),
            after,
            data=data,
            has_end=has_end,
            has_end_token=bool(end),
        )

    def _text(self, text: str) -> TokenSpans:
        return tokenize_with_spans([text], self.tokenizer, self.table)[0]

    def _bytes(self, data: bytes) -> TokenSpans:
        found = [self.table.text_ids.get(bytes([byte]), self._unknown_id) for byte in data]
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

    def _framed(
        self,
        before: Sequence[int] | np.ndarray,
        ids: Sequence[int],
        bounds: np.ndarray,
        after: Sequence[int] | np.ndarray,
        *,
        data: bytes,
        has_end: bool,
        has_end_token: bool,
        num_added: int = 0,
    ) -> Piece:
        first, stop = len(before), len(before) + len(ids)
        whole = np.concatenate([before, ids, after]).astype(np.int64)
        is_text = np.zeros(len(whole), dtype=bool)
        is_text[first:stop] = True
        is_exact = np.zeros(len(whole), dtype=bool)
        contents, edges = [self.table.content[one] for one in ids], bounds.tolist()
        is_exact[first:stop] = [
            content == data[start:end]
            for content, start, end in zip(contents, edges[:-1], edges[1:], strict=True)
        ]
        is_spelt = is_exact.copy()
        is_exact &= whole != self.frame.end_id
        for idx in self.frame.starts(ids):
            is_spelt[first + idx] |= contents[idx] == b" " + data[edges[idx] : edges[idx + 1]]
        around = [
            np.full(len(one), bound) for one, bound in ((before, bounds[0]), (after, bounds[-1]))
        ]
        spans = TokenSpans(
            ids=whole, bounds=np.concatenate([around[0], bounds, around[1]]), is_text=is_text
        )
        return Piece(
            data=data,
            spans=spans,
            is_exact=is_exact,
            is_spelt=is_spelt,
            first=first,
            stop=stop,
            has_end=has_end,
            has_end_token=has_end_token,
            num_added=num_added,
            num_unknown=list(ids).count(self.table.unknown),
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
