"""A cached sample as a student of another tokenizer reads it, and where the two meet.

The student reads the same pieces of documents, in tokens of its own. At a position of its where
both have read the same bytes, the two predict the same text, so the teacher's distribution there,
with its ids mapped, can teach it. That they *mean* the same needs one thing more: a token's bytes
must be what it stands for at this place, which a begin of text, a normaliser or an unknown token
can break. So both sides' next tokens must spell the text exactly, or both be the end of it. A chunk
is compared where on either side its tokens spell its bytes; others are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.schema import CONTINUES, NEXT_LOG_PROB
from teacher_cache.stages.join.rereading import Piece, Reader
from teacher_cache.stages.tokens.byte_bounds import TokenSpans


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


NO_POSITION = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignedSample:
    """One sample, S of the student's tokens.

    Attributes:
        input_ids: uint32 [S].
        segment: uint16 [S], which piece a token is of, as the cache numbers them.
        teacher_positions: int64 [S], the teacher's position that has read the same bytes;
            `NO_POSITION` where there is none, or nothing comes next on one side.
        is_one_to_one: bool [S], of these, where both next tokens are the same bytes, too.
        chunk_index: int64 [S], of the chunk that the next token is in; -1 for none.
        teacher_chunks: float32 [C] nats, the teacher's log-prob of each chunk's text.
        num_bytes: of text that the student predicts.
        num_teacher_bytes: the same of the teacher.
        teacher_nll: nats, of all that the teacher predicts.
        num_unequal_chunks: left out, since the tokens of one side spell something else.
        num_unknown: the teacher's tokens for what it does not know, which are no text.
    """

    input_ids: np.ndarray
    segment: np.ndarray
    teacher_positions: np.ndarray
    is_one_to_one: np.ndarray
    chunk_index: np.ndarray
    teacher_chunks: np.ndarray
    num_bytes: int
    num_teacher_bytes: int
    teacher_nll: float
    num_unequal_chunks: int = 0
    num_unknown: int = 0


@dataclass(frozen=True, kw_only=True)
class SampleAligner:
    """Both sides' tokenizers."""

    teacher: Reader
    student: Reader

    def __call__(self, sample: Mapping[str, np.ndarray]) -> AlignedSample:
        """Align one sample.

        Args:
            sample: of a language model's cache, with `input_ids`, `segment`, `loss_mask` and
                `next_log_prob`, [S_t] each, and where it is known `continues`.
        """
        segments = np.unique(sample["segment"])
        starts = np.searchsorted(sample["segment"], segments)
        stops = np.append(starts[1:], len(sample["segment"]))
        next_log_prob = sample[NEXT_LOG_PROB].astype(np.float64)
        continues = sample.get(CONTINUES)
        parts: list[AlignedSample] = []
        num_chunks = 0
        for segment, start, stop in zip(segments, starts, stops, strict=True):
            # Only a sample's first piece may go on with a document.
            begins = True if segment > 0 else None if continues is None else not continues
            ours = self.teacher.piece_of_ids(
                sample["input_ids"][start:stop].astype(np.int64), begins=begins
            )
            theirs = self.student.piece_of_bytes(ours.data, has_end=ours.has_end)
            part = _aligned_piece(ours, theirs, next_log_prob[start:stop], segment)
            parts.append(_moved(part, by_tokens=int(start), by_chunks=num_chunks))
            num_chunks += len(part.teacher_chunks)
        return _joined(parts)


def _aligned_piece(
    teacher: Piece, student: Piece, next_log_prob: np.ndarray, segment: int
) -> AlignedSample:
    num = len(student)
    theirs, ours = _same_prefix(teacher, student)
    positions = np.full(num, NO_POSITION, dtype=np.int64)
    positions[theirs] = ours

    chunks = align_spans(teacher.spans, student.spans)
    pairs = set(zip(*(side.tolist() for side in chunks.one_to_one_positions()), strict=True))
    is_end = theirs == student.stop - 1
    one_to_one = np.zeros(num, dtype=bool)
    one_to_one[theirs] = is_end | np.array(
        [pair in pairs for pair in zip(ours.tolist(), theirs.tolist(), strict=True)], dtype=bool
    )

    is_equal = _is_spelt(teacher, chunks.teacher) & _is_spelt(student, chunks.student)
    predicted = np.flatnonzero(chunks.is_predicted & is_equal)
    renumbered = np.full(len(chunks) + 1, -1, dtype=np.int64)  # the last for -1 itself
    renumbered[predicted] = np.arange(len(predicted))
    teacher_chunks = np.array(
        [next_log_prob[first - 1 : stop - 1].sum() for first, stop in chunks.teacher[predicted]],
        dtype=np.float32,
    )
    return AlignedSample(
        input_ids=student.spans.ids.astype(np.uint32),
        segment=np.full(num, segment, dtype=np.uint16),
        teacher_positions=positions,
        is_one_to_one=one_to_one,
        chunk_index=renumbered[chunks.index_of_positions(chunks.student, num)],
        teacher_chunks=teacher_chunks,
        num_bytes=student.num_predicted_bytes,
        num_teacher_bytes=teacher.num_predicted_bytes,
        teacher_nll=float(-next_log_prob[:-1].sum()),
        num_unequal_chunks=int((chunks.is_predicted & ~is_equal).sum()),
        num_unknown=teacher.num_unknown,
    )


def _is_spelt(piece: Piece, ranges: np.ndarray) -> np.ndarray:
    """Whether all tokens of each chunk spell its bytes."""
    wrong = np.append(0, np.cumsum(~piece.is_spelt))
    return wrong[ranges[:, 1]] == wrong[ranges[:, 0]]


def _same_prefix(teacher: Piece, student: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Positions of student and teacher that have read the same bytes and go on exactly.

    Of several tokens that end at one byte, the last one.
    """
    (our_ends, ours), (their_ends, theirs) = (_positions_by_byte(one) for one in (teacher, student))
    _, our_idx, their_idx = np.intersect1d(
        our_ends, their_ends, assume_unique=True, return_indices=True
    )
    ours, theirs = ours[our_idx], theirs[their_idx]
    goes_on = _is_exact_next(teacher, ours) & _is_exact_next(student, theirs)
    both_end = (ours == teacher.stop - 1) & (theirs == student.stop - 1)
    both_end &= teacher.has_end_token and student.has_end_token
    kept = goes_on | both_end
    return theirs[kept], ours[kept]


def _positions_by_byte(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Bytes at which a position of text, or the last before it, ends; and these positions."""
    first = max(piece.first - 1, 0)
    ends = piece.spans.bounds[first + 1 : piece.stop + 1]
    found, from_behind = np.unique(ends[::-1], return_index=True)
    return found, first + len(ends) - 1 - from_behind


def _is_exact_next(piece: Piece, positions: np.ndarray) -> np.ndarray:
    """Whether a token of text comes next and spells its bytes."""
    return np.append(piece.is_exact, False)[positions + 1]


def _moved(part: AlignedSample, *, by_tokens: int, by_chunks: int) -> AlignedSample:
    """A piece's part as one of a sample: the teacher's positions and the chunks go on counting."""
    positions, chunk_index = part.teacher_positions, part.chunk_index
    return replace(
        part,
        teacher_positions=np.where(positions < 0, positions, positions + by_tokens),
        chunk_index=np.where(chunk_index < 0, chunk_index, chunk_index + by_chunks),
    )


def _joined(parts: list[AlignedSample]) -> AlignedSample:
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    sums = [name for name in vars(parts[0]) if name not in arrays]
    return AlignedSample(
        **arrays, **{name: sum(getattr(part, name) for part in parts) for name in sums}
    )


NUM_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of the first samples of a cache.

    Attributes:
        positions: share of the student's positions at which the teacher's distribution is known.
        one_to_one: share at which both next tokens are the same bytes, too.
        chunks_a_token: chunks that both predict, for each of the student's next tokens.
        mass: mean of the teacher's mass that maps to the student's ids where it is known. Of a
            head without its tail it is a bound from below.
        num_tokens: of the student's next tokens, that this was measured on.
        unequal_chunks: share of the chunks that are left out, since the tokens of one side spell
            something else.
        unknown: the teacher's tokens for what it does not know, for each of the student's tokens.
    """

    positions: float
    one_to_one: float
    chunks_a_token: float
    mass: float
    num_tokens: int
    unequal_chunks: float = 0.0
    unknown: float = 0.0

    @property
    def words(self) -> str:
        """In words, for a message."""
        words = (
            f"on the first {self.num_tokens:,} tokens of its text, {self.positions:.1%} of the "
            f"student's positions have the teacher's distribution, of whose mass {self.mass:.1%} "
            "maps"
        )
        if self.unequal_chunks:
            words += (
                f"; {self.unequal_chunks:.1%} of the chunks are left out, whose tokens spell other "
                "bytes on one side"
            )
        if self.unknown:
            words += (
                f"; the text lacks what {round(self.unknown * self.num_tokens):,} of the teacher's "
                "tokens stood for, which are unknown"
            )
        return words

    def to_json(self) -> dict[str, Any]:
        """As a run records it."""
        rounded = {name: round(value, 4) for name, value in vars(self).items()}
        return {name: rounded[name] for name in rounded if name not in _IF_ANY or rounded[name]}


_IF_ANY = ("unequal_chunks", "unknown")  # recorded where there are any


def measure(
    samples: Sequence[Mapping[str, np.ndarray]],
    codec: Codec,
    aligner: SampleAligner,
    head_ids: np.ndarray | None,
    *,
    temperature: float,
) -> Coverage:
    """Align some samples and count.

    Args:
        samples: as cached.
        codec: of the cache, opened.
        aligner: of the two tokenizers.
        head_ids: `Alignment.head_ids`.
        temperature: one that the cache serves; 1 where it serves that.
    """
    num_tokens = num_positions = num_one_to_one = num_chunks = num_unequal = num_unknown = 0
    masses: list[float] = []
    for sample in samples:
        aligned = aligner(sample)
        has_next = np.zeros(len(aligned.segment), dtype=bool)
        has_next[:-1] = aligned.segment[1:] == aligned.segment[:-1]
        known = aligned.teacher_positions[aligned.teacher_positions >= 0]
        num_tokens += int(has_next.sum())
        num_positions += len(known)
        num_one_to_one += int(aligned.is_one_to_one.sum())
        num_chunks += len(aligned.teacher_chunks)
        num_unequal += aligned.num_unequal_chunks
        num_unknown += aligned.num_unknown
        masses += _mapped_mass(sample, codec, head_ids, known, temperature)
    return Coverage(
        positions=num_positions / max(1, num_tokens),
        one_to_one=num_one_to_one / max(1, num_tokens),
        chunks_a_token=num_chunks / max(1, num_tokens),
        mass=float(np.mean(masses)) if masses else 0.0,
        num_tokens=num_tokens,
        unequal_chunks=num_unequal / max(1, num_unequal + num_chunks),
        unknown=num_unknown / max(1, num_tokens),
    )


def _mapped_mass(
    sample: Mapping[str, np.ndarray],
    codec: Codec,
    head_ids: np.ndarray | None,
    positions: np.ndarray,
    temperature: float,
) -> list[float]:
    """At each position, the mass of the ids that have a student's id."""
    expanded = codec.expand(sample)
    stored = {name: torch.from_numpy(field[positions]) for name, field in expanded.items()}
    decoded = codec.decode(stored, temperature)
    probs = torch.as_tensor(decoded.log_probs).exp()
    if head_ids is None:
        return probs.sum(dim=-1).tolist()
    is_known = torch.from_numpy(np.append(head_ids >= 0, False))  # an empty slot's -1 finds the end
    ids = decoded.ids
    has_id = is_known[: probs.shape[-1]] if ids is None else is_known[torch.as_tensor(ids)]
    return torch.where(has_id, probs, 0.0).sum(dim=-1).tolist()
