"""Which samples share a forward pass, so that a model reads each as if it stood alone.

Most models do whatever stands beside a sample. Others let masked padding reach their logits (FNet's
Fourier transform, Nyströmformer's landmarks), choose how they read by the longest sequence of a
pass (LongRoPE's factors, BigBird's attention), or pool where only a text without padding has its
end (XLNet). So it is measured: documents alone against documents together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.collation import length_sorted_batches

Rows = Literal["packed", "padded", "equal", "single"]
SAID: Mapping[Rows, str] = {
    "packed": "several documents run in one row",
    "padded": "each document runs as a row of its own",
    "equal": "only documents of equal length run together",
    "single": "each document runs by itself",
}
SHORT = (9, 1, 14, 3, 6, 9)  # tokens of documents that are run together
NEIGHBOUR = 14  # tokens of what stands beside a long one
# In names of a configuration's numbers that may be lengths beyond which it reads otherwise.
_LENGTH_WORDS = ("position", "window", "chunk", "block", "length", "landmark", "floor", "topk")
# Of the spread of a row's logits; float32 rounds a thousand times finer.
_TOLERANCE = 1e-3
_MOST_SPREAD = 100.0  # nats; beyond, an outcome is as good as masked
_ROUNDING = 1e-5  # of a log-prob itself
_LAST_PLACES = 16 * float(torch.finfo(torch.float32).eps)  # of the largest logit

MODEL_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)
"""What a model of others may raise at rows that it is not built for."""

logger = logging.getLogger(__name__)

Read = Callable[[Sequence[np.ndarray], "Batching"], Sequence[Tensor]]
"""Runs some documents in as few passes as a batching allows: what it says of each, [n_i, V]."""
IsClose = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Which sequences share a pass.

    Attributes:
        rows: packed, several documents a row; padded, one a row, and shorter ones are filled up;
            equal, rows of one length alone; single, one document a pass.
        borders: lengths in tokens; a sequence that is longer than one shares no pass with one that
            is not.
        counted_id: sequences share a pass only if they have it equally often.
        end_id: a sequence that ends with it shares a pass only with those of its length.
        cost: how many times as long as the usual way it took when it was measured; None where that
            way failed or nothing was measured.
    """

    rows: Rows = "padded"
    borders: tuple[int, ...] = ()
    counted_id: int | None = None
    end_id: int | None = None
    cost: float | None = field(default=None, compare=False)

    def batches(self, sequences: Sequence[np.ndarray], *, max_tokens: int) -> list[np.ndarray]:
        """Indices of the sequences of each pass, the longest first; each index once.

        Args:
            sequences: token ids, [S_i] each.
            max_tokens: the most padded tokens of a pass; one sequence alone may have more.

        Raises:
            ValueError: if `max_tokens` is not positive.
        """
        lengths = np.array([len(ids) for ids in sequences], np.int64)
        if self.rows == "single":
            return length_sorted_batches(lengths, max_tokens=1)
        groups: dict[tuple[int, ...], list[int]] = {}
        for idx in np.argsort(-lengths, kind="stable").tolist():
            groups.setdefault(self._kind(sequences[idx]), []).append(idx)
        return [
            np.array(group)[batch]
            for group in groups.values()
            for batch in length_sorted_batches(lengths[group], max_tokens=max_tokens)
        ]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"rows": self.rows, "borders": list(self.borders)}

    def settings(self) -> dict[str, Any]:
        """For the fingerprint; empty where values are those of padded or packed rows.

        Releases before this one knew no other rows.
        """
        plain = self.rows in ("packed", "padded") and not self.borders
        return {} if plain else {"batching": self.to_json()}

    def __str__(self) -> str:
        """For the log."""
        borders = " and ".join(f"{border:,}" for border in self.borders)
        of_one_side = f", never on both sides of {borders} tokens" if borders else ""
        cost = "" if self.cost is None else f" ({self.cost:.1f} times as long when it was measured)"
        return SAID[self.rows] + of_one_side + cost

    def _kind(self, ids: np.ndarray) -> tuple[int, ...]:
        """Sequences of one kind share a pass."""
        length = len(ids)
        side = int(np.searchsorted(self.borders, length))
        ends = self.end_id is not None and length > 0 and int(ids[-1]) == self.end_id
        count = 0 if self.counted_id is None else int((ids == self.counted_id).sum())
        return side, length if self.rows == "equal" or ends else 0, count


ALONE = Batching(rows="single")
"""The truth that others are measured by."""
PADDED = Batching(rows="padded")
PACKED = Batching(rows="packed")


def measured_batching(
    name: str,
    config: PreTrainedConfig,
    read: Read,
    document: Callable[[int], np.ndarray],
    is_close: IsClose,
    *,
    max_length: int,
    plain: Sequence[Batching],
) -> Batching:
    """The fastest of some batchings in which a model says of each document what it says alone.

    Documents of a few tokens are run together, and longer ones with a short one beside them: on
    both sides of each length that the configuration names, and of `max_length`.

    Args:
        name: the model is called in a message.
        config: its own.
        read: runs it.
        document: one of so many tokens, another at each call.
        is_close: whether it says the same of a document.
        max_length: the longest sample in tokens.
        plain: that are tried first, in their order; what all of them share holds for the others.

    Raises:
        UserError: if it says something else of a document each time.
    """
    borders = _named_lengths(config, below=max_length)
    last = plain[-1]
    split = [(one,) for one in borders] + ([borders] if len(borders) > 1 else [])
    candidates = [
        *plain,
        *(replace(last, borders=one) for one in split),
        replace(last, rows="equal"),
        replace(last, rows="single"),
    ]
    least = _shortest(name, read, document)
    trials = list(_trials(lambda length: document(max(least, length)), borders, max_length))
    alone = [list(read(trial, ALONE)) for trial in trials]
    again = [list(read(trial[::-1], ALONE))[::-1] for trial in trials]
    if not _all_close(is_close, again, alone):
        raise UserError(
            f"{name} says something else of a text each time it reads it, so nothing of it can be "
            "cached: give a model whose passes are repeatable (with hash_seed set, where its "
            "configuration has one)"
        )
    usual_runs: list[Sequence[np.ndarray]] = []  # trials that the usual way read, if wrongly
    for candidate in candidates:
        ran: list[Sequence[np.ndarray]] = []
        try:
            if _agrees(read, candidate, zip(trials, alone, strict=True), is_close, ran):
                return replace(candidate, cost=_cost(read, candidate, plain[0], usual_runs))
        except (*MODEL_FAILURES, UserError) as error:
            logger.debug("%s, %s: %s", name, candidate, error)
        if candidate is plain[0]:
            usual_runs = ran
    raise AssertionError("the last candidate is what all were measured by")


def _agrees(
    read: Read,
    batching: Batching,
    trials: Iterable[tuple[Sequence[np.ndarray], Sequence[Tensor]]],
    is_close: IsClose,
    ran: list[Sequence[np.ndarray]],
) -> bool:
    """Whether trials are read as their documents alone; notes those that were read."""
    for trial, expected in trials:
        found = list(read(trial, batching))
        ran.append(trial)
        if not _all_close(is_close, [found], [expected]):
            return False
    return True


def _cost(
    read: Read, chosen: Batching, usual: Batching, trials: Sequence[Sequence[np.ndarray]]
) -> float | None:
    """How many times as long trials take as in the usual way; None where that read none.

    Both have read them once before: what a first pass sets up is not counted.
    """
    seconds = {chosen: [0.0, 0.0], usual: [0.0, 0.0]}
    for turn in range(2):
        for batching, found in seconds.items():
            began = time.perf_counter()
            for trial in trials:
                list(read(trial, batching))
            found[turn] = time.perf_counter() - began
    return min(seconds[chosen]) / min(seconds[usual]) if trials else None


def logits_close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits [n, V] are equal but for rounding."""
    return _close(found.float(), expected.float(), expected)


def log_probs_close(found: Tensor, expected: Tensor) -> bool:
    """Whether distributions are equal but for rounding, of logits [n, V] over the ids that count.

    What is masked in both, by whatever large number, says nothing of the rest; nor does a shift of
    all logits.
    """
    return found.shape == expected.shape and _close(
        found.float().log_softmax(dim=-1), expected.float().log_softmax(dim=-1), expected
    )


def _close(found: Tensor, expected: Tensor, logits: Tensor) -> bool:
    """Within what float32 rounds off logits of that size and spread, with much room."""
    if found.shape != expected.shape:
        return False
    apart = torch.where(found == expected, 0.0, (found - expected).abs())
    largest = expected.amax(dim=-1, keepdim=True)
    spread = (largest - expected).median(dim=-1, keepdim=True).values.clamp(1.0, _MOST_SPREAD)
    allowed = _TOLERANCE * spread + _LAST_PLACES * logits.float().amax(dim=-1, keepdim=True).abs()
    allowed = allowed + _ROUNDING * torch.where(expected.isfinite(), expected.abs(), 0.0)
    return bool((apart <= allowed).all())  # a NaN is not


def _all_close(
    is_close: IsClose, found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]
) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(is_close(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def _shortest(name: str, read: Read, document: Callable[[int], np.ndarray]) -> int:
    """Tokens of the shortest document that it reads at all: CANINE joins four characters."""
    failure: Exception | None = None
    for length in range(1, NEIGHBOUR + 1):
        try:
            read([document(length)], ALONE)
            return length
        except (*MODEL_FAILURES, UserError) as error:
            failure = error
    raise UserError(f"{name} cannot read a text of {NEIGHBOUR} tokens: {failure}") from failure


def _trials(
    document: Callable[[int], np.ndarray], borders: Sequence[int], max_length: int
) -> Iterator[list[np.ndarray]]:
    """Documents that are run together."""
    yield [document(length) for length in SHORT if length <= max_length]
    for border in borders:
        yield [document(border), document(border + 1), document(min(NEIGHBOUR, border))]
    long = max_length - NEIGHBOUR  # with its neighbour, in one row, as long as any row
    if long > NEIGHBOUR:
        yield [document(long), document(NEIGHBOUR), document(long), document(NEIGHBOUR)]


def _named_lengths(config: PreTrainedConfig, *, below: int) -> tuple[int, ...]:
    """Numbers of a configuration that may be lengths in tokens, ascending."""
    found: set[int] = set()

    def look(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                look(value)
            elif isinstance(value, int) and any(word in name for word in _LENGTH_WORDS):
                found.add(value)

    look(config.to_dict())
    return tuple(sorted(one for one in found if NEIGHBOUR // 2 < one < below))
