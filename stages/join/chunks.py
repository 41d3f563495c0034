"""Chunks of a text that both tokenizers hold in whole tokens.

The text is cut wherever both tokenizations have a border, in bytes. Within a chunk the two models
spell the same bytes in tokens of their own, so the chunk's likelihoods can be compared: the sum of
its tokens' log-probs (Minixhofer et al. 2025, section 3, arXiv:2503.20083).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from teacher_cache.stages.join.byte_bounds import TokenSpans


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """The chunks of one text, in order.

    Attributes:
        teacher: int64 [N, 2], first token and the one after the last.
        student: int64 [N, 2], the same of the student's tokens.
        byte_range: int64 [N, 2], where the chunk lies in the text.
    """

    teacher: np.ndarray
    student: np.ndarray
    byte_range: np.ndarray

    def __len__(self) -> int:
        return len(self.byte_range)

    @property
    def is_one_to_one(self) -> np.ndarray:
        """Bool [N]: one token on either side, so that the two distributions can be compared."""
        one = np.diff(self.teacher, axis=1) == 1
        return (one & (np.diff(self.student, axis=1) == 1))[:, 0]

    @property
    def is_predicted(self) -> np.ndarray:
        """Bool [N]: neither side's chunk holds the first token, which no position predicts."""
        return (self.teacher[:, 0] > 0) & (self.student[:, 0] > 0)

    def index_of_positions(self, ranges: np.ndarray, num_positions: int) -> np.ndarray:
        """The chunk whose token each position predicts.

        Args:
            ranges: `teacher` or `student`.
            num_positions: tokens S of that side.

        Returns:
            int64 [S]; -1 where the next token is of no chunk, or of one that is not predicted.
        """
        if not len(self):
            return np.full(num_positions, -1, dtype=np.int64)
        next_token = np.arange(1, num_positions + 1)
        index = np.searchsorted(ranges[:, 0], next_token, side="right") - 1
        inside = (index >= 0) & (next_token < ranges[index, 1]) & self.is_predicted[index]
        return np.where(inside, index, -1)

    def one_to_one_positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions at which both have read the same bytes and next a token of the same bytes.

        Returns:
            int64 [M] of the teacher and [M] of the student: where to compare the mapped
            distributions.
        """
        chosen = self.is_one_to_one & self.is_predicted
        return self.teacher[chosen, 0] - 1, self.student[chosen, 0] - 1


def align_spans(teacher: TokenSpans, student: TokenSpans) -> Chunks:
    """Cut a text where both tokenizations have a border.

    Tokens that stand for no text are in no chunk, wherever they are, so that a begin-of-sequence
    token on one side changes nothing. Text tokens without width belong to the chunk that follows
    them. Bytes that only one side covers, after a truncation, are in none.

    Args:
        teacher: the tokens of one text.
        student: the other tokens of the same text.
    """
    edges = np.intersect1d(teacher.bounds, student.bounds)  # sorted, each once
    return Chunks(
        teacher=_token_ranges(teacher, edges),
        student=_token_ranges(student, edges),
        byte_range=np.stack([edges[:-1], edges[1:]], axis=1),
    )


def _token_ranges(spans: TokenSpans, edges: np.ndarray) -> np.ndarray:
    """First and last-but-one token of each chunk, int64 [N, 2]."""
    inner = np.flatnonzero(spans.is_text)
    starts, ends = spans.bounds[inner], spans.bounds[inner + 1]
    # By the start, so that a token without width goes to what follows; the last of them, which
    # nothing follows, by the end.
    first = np.searchsorted(starts, edges[:-1], side="left")
    stop = np.searchsorted(starts, edges[1:], side="left")
    if len(edges) > 1:
        stop[-1] = np.searchsorted(ends, edges[-1], side="right")
    return np.stack([inner[first], inner[stop - 1] + 1], axis=1).reshape(-1, 2).astype(np.int64)
