"""Batches of samples: which go together, and how they are padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pad_batch(sequences: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids on the right to one length.

    Args:
        sequences: B arrays of token ids, [S] each.
        pad_id: fills the positions behind a sequence.

    Returns:
        int64 [B, S] token ids, and bool [B, S], True where there is a token.

    Raises:
        ValueError: if there are no sequences.
    """
    if not sequences:
        raise ValueError("expected at least one sequence")
    lengths = np.array([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    attention_mask = np.arange(width)[None, :] < lengths[:, None]  # [B, S]
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    for idx, sequence in enumerate(sequences):
        input_ids[idx, : len(sequence)] = sequence
    return input_ids, attention_mask


def length_sorted_batches(
    lengths: Sequence[int] | np.ndarray, *, max_tokens: int
) -> list[np.ndarray]:
    """Group samples of like length, so that little is padded.

    The longest come first: what does not fit in memory fails at once.

    Args:
        lengths: tokens of each sample.
        max_tokens: the most padded tokens of a batch (its longest sample times its samples); one
            sample alone may have more.

    Returns:
        The indices of each batch; every index once, equal lengths in their own order.

    Raises:
        ValueError: if `max_tokens` is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    lengths_array = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths_array, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths_array[order[start]]))
        stop = start + max(1, max_tokens // longest)
        batches.append(order[start:stop])
        start = stop
    return batches
