"""Where in the bytes of a text each token lies.

`tokenizers` gives offsets in characters, and the several tokens of one emoji all get the whole
character, so that cutting there would tear nothing apart but would see no border either. Where the
tokens' own bytes spell the text, which holds for byte-level BPE without a normaliser, their lengths
give the exact borders; elsewhere the characters do, and tokens of one character are told apart by
their bytes where those add up.

Tokens lie end to end: what a tokenizer leaves out of its tokens (BERT the spaces) belongs to the
token after it, as BPE's leading space does, and after the last to the last. A combining mark that
it leaves out belongs to the token before it, whose letter carries it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from teacher_cache.stages.tokens.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSpans:
    """The tokens of one text and where they lie.

    Attributes:
        ids: int64 [S], special tokens included.
        bounds: int64 [S+1], not decreasing; token i lies at bytes bounds[i]..bounds[i+1] of the
            text in UTF-8. It begins after 0 or ends before the text's end where the text was
            truncated or the tokenizer has no token for it.
        is_text: bool [S], False for a token that stands for no text, a begin of sequence say.
    """

    ids: np.ndarray
    bounds: np.ndarray
    is_text: np.ndarray

    def __post_init__(self) -> None:
        if not (len(self.ids) + 1 == len(self.bounds) == len(self.is_text) + 1):
            raise ValueError(
                f"{len(self.ids)} ids, {len(self.bounds)} bounds, {len(self.is_text)} flags"
            )
        if np.any(np.diff(self.bounds) < 0):
            raise ValueError("bounds decrease")
        if np.any(np.diff(self.bounds)[~self.is_text]):
            raise ValueError("a token that stands for no text has bytes")


def tokenize_with_spans(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    table: TokenBytes,
    *,
    max_length: int | None = None,
) -> list[TokenSpans]:
    """Tokenize with special tokens, and say where each token lies.

    Args:
        texts: in any number.
        tokenizer: as `tokenizers` runs it.
        table: its `token_bytes`.
        max_length: tokens at which to cut, special tokens included; not cut by default.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=True,
        padding=False,
        truncation=max_length is not None,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    return [
        spans_of(
            text,
            ids,
            characters,
            added,
            table,
            is_whole=max_length is None or len(ids) < max_length,
        )
        for text, ids, characters, added in zip(
            texts,
            encoded["input_ids"],
            encoded["offset_mapping"],
            encoded["special_tokens_mask"],
            strict=True,
        )
    ]


def spans_of(
    text: str,
    ids: Sequence[int],
    characters: Sequence[tuple[int, int]],
    added: Sequence[int],
    table: TokenBytes,
    *,
    is_whole: bool,
) -> TokenSpans:
    """Byte spans of one encoding.

    Args:
        text: as it was tokenized.
        ids: [S] what it became.
        characters: [S] `offset_mapping`.
        added: [S] `special_tokens_mask`, 1 for a token that the tokenizer put around the text. A
            special token that the text itself spells has 0.
        table: the tokenizer's `token_bytes`.
        is_whole: False where the text may have been truncated.
    """
    is_text = np.array(added, dtype=np.int64) == 0
    inner = np.flatnonzero(is_text)
    bounds = np.zeros(len(ids) + 1, dtype=np.int64)
    if len(inner):
        # Byte at which each character begins, and the end.
        byte_at = np.cumsum([0, *(len(character.encode()) for character in text)], dtype=np.int64)
        data = text.encode()
        pieces = [table.content[ids[idx]] or b"" for idx in inner.tolist()]
        spans = byte_at[
            np.array([characters[idx] for idx in inner.tolist()], dtype=np.int64)
        ]  # [., 2]
        found = _spelt(data, spans, pieces, is_whole=is_whole)
        if found is None:
            spans = _with_marks(spans, text, byte_at)
            found = _by_characters(data, spans, pieces, is_whole=is_whole)
        first, ends = found
        bounds[:] = first
        bounds[inner + 1] = ends
    return TokenSpans(
        ids=np.array(ids, dtype=np.int64), bounds=np.maximum.accumulate(bounds), is_text=is_text
    )


def spans_of_bytes(ids: Sequence[int], table: TokenBytes) -> TokenSpans:
    """Byte spans of ids alone, laid end to end: of a text that need not be UTF-8.

    A special token stands for no text here.
    """
    is_text = np.array([token_id not in table.special for token_id in ids], dtype=bool)
    lengths = [
        len(table.content[token_id] or b"") if text else 0
        for token_id, text in zip(ids, is_text, strict=True)
    ]
    return TokenSpans(
        ids=np.array(ids, dtype=np.int64),
        bounds=np.cumsum([0, *lengths], dtype=np.int64),
        is_text=is_text,
    )


def _spelt(
    data: bytes, spans: np.ndarray, pieces: Sequence[bytes], *, is_whole: bool
) -> tuple[int, np.ndarray] | None:
    """Where the pieces begin, and their ends, if end to end they spell the text.

    The characters' offsets may leave out the leading spaces that a token has (`trim_offsets`), and
    the first token may have one that the text has not (`add_prefix_space`).
    """
    joined = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    anchor = int(spans[0, 0])
    num_spaces = len(pieces[0]) - len(pieces[0].lstrip(b" "))
    for first in (0,) if is_whole else (anchor, anchor - num_spaces):
        for num_extra in (0, 1) if num_spaces else (0,):
            spelt = joined[num_extra:]
            reaches = first + len(spelt) == len(data) or not is_whole
            if first >= 0 and reaches and data.startswith(spelt, first):
                return first, ends + first - num_extra
    return None


def _with_marks(spans: np.ndarray, text: str, byte_at: np.ndarray) -> np.ndarray:
    """Spans that reach over the combining marks behind them which no token covers."""
    if text.isascii():
        return spans
    is_mark = np.array([unicodedata.category(character)[0] == "M" for character in text] + [False])
    covered = np.zeros(len(text) + 2, dtype=np.int64)
    starts, ends = (np.searchsorted(byte_at, spans[:, side]) for side in (0, 1))
    np.add.at(covered, starts, 1)
    np.add.at(covered, ends, -1)
    left_out = is_mark & (np.cumsum(covered)[: len(is_mark)] == 0)
    if not left_out.any():
        return spans
    # Where the run of left-out marks from each character on ends.
    stops = np.flatnonzero(~left_out)
    reach = stops[np.searchsorted(stops, np.arange(len(left_out)))]
    return np.stack([spans[:, 0], byte_at[np.where(ends > starts, reach[ends], ends)]], axis=1)


def _by_characters(
    data: bytes, spans: np.ndarray, pieces: Sequence[bytes], *, is_whole: bool
) -> tuple[int, np.ndarray]:
    """Where the pieces begin, and their ends, from the characters that they cover.

    Pieces that cover characters in common end with the last of these, unless their bytes spell
    them.
    """
    before = data[: spans[0, 0]]
    first = 0 if is_whole or not before.strip() else int(spans[0, 0])
    ends = np.maximum.accumulate(spans[:, 1])
    for start, stop in _overlapping(spans):
        end = int(ends[stop - 1])
        joined = b"".join(pieces[start:stop])
        previous = int(ends[start - 1]) if start else first
        if previous <= end - len(joined) and data[end - len(joined) : end] == joined:
            lengths = [len(piece) for piece in pieces[start:stop]]
            ends[start:stop] = end - len(joined) + np.cumsum(lengths)
        else:
            # Only the last can be a border; the others get no width, and stay before it.
            ends[start : stop - 1] = previous
    if is_whole or not data[ends[-1] :].strip():
        ends[-1] = len(data)
    return first, ends


def _overlapping(spans: np.ndarray) -> list[tuple[int, int]]:
    """Start and stop of each run of two or more pieces that cover characters in common."""
    reached = np.maximum.accumulate(spans[:, 1])
    fresh = np.flatnonzero(spans[1:, 0] >= reached[:-1]) + 1
    edges = [0, *fresh.tolist(), len(spans)]
    return [(a, b) for a, b in pairwise(edges) if b - a > 1]
