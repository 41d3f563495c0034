"""How many bytes of text the tokens of packed rows stand for: what bits a byte are counted by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.data.packing import PackedRow
from teacher_cache.stages.join.rereading import Reader


def num_bytes_by_id(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, str | None]:
    """Bytes of text that each id stands for, int64 [V]; 0 of special tokens, which are no text.

    Where the tokenizer begins a text with a space that the text has not, the begin token before it
    takes that back: -1.

    Returns:
        The numbers, and what the tokens do not keep of a text; None where they keep all.

    Raises:
        UserError: for a tokenizer that does not tell.
    """
    reader = Reader.of(tokenizer)
    return _sizes(reader), reader.caveat


def num_predicted_bytes(
    rows: Sequence[PackedRow], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str | None]:
    """Bytes of the text whose tokens some position predicts.

    Returns:
        The number, and why it is not comparable with another tokenizer's; None where it is.

    Raises:
        UserError: for a tokenizer that does not tell.
    """
    reader = Reader.of(tokenizer)
    sizes, begin = _sizes(reader), reader.frame.before
    num_bytes = num_unknown = 0
    for row in rows:
        ids = row.input_ids.astype(np.int64)
        num_unknown += int((ids == reader.table.unknown).sum())
        for place, piece in enumerate(np.split(ids, np.cumsum(row.lengths)[:-1])):
            num_bytes += int(sizes[piece[1:]].sum())
            if begin and (place or not row.continues) and tuple(piece[: len(begin)]) == begin:
                num_bytes -= reader.piece_of_ids(piece[: len(begin) + 2], begins=True).num_added
    caveats = [] if reader.caveat is None else [f"{reader.caveat}: compare it with no other's"]
    if num_unknown:
        caveats.append(f"{num_unknown:,} unknown tokens count for no byte")
    return num_bytes, "; ".join(caveats) or None


def _sizes(reader: Reader) -> np.ndarray:
    sizes = np.array(
        [
            0 if content is None or token_id in reader.table.special else len(content)
            for token_id, content in enumerate(reader.table.content)
        ],
        np.int64,
    )
    if reader.frame.before and reader.frame.adds_space:
        sizes[reader.frame.before[-1]] = -1
    return sizes
