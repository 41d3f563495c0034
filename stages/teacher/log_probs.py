"""What an inference engine wrote of documents: a file, one document a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import file_sha256


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A document and what the engine said of it.

    Attributes:
        text: of the document.
        token_ids: [S], as the engine read it, with the special tokens that it added.
        lists: [S], the log-probs of each token given those before it; None for the first.
    """

    text: str
    token_ids: Sequence[int]
    lists: Sequence[TopLogProbs | None]


class LogProbFile:
    """Answers in a JSONL file, one document a line, in vLLM's form.

    A line is `{"text": ..., "prompt_token_ids": [...], "prompt_logprobs": [null, {"11": {"logprob":
    -1.2, ...}, ...}, ...]}`; a plain number in the place of an object will do. The file is read
    twice: once to find its lines, once when the cache is written, a shard at a time.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        num_duplicates: documents whose text an earlier one has too.

    Raises:
        UserError: if the file is not there, or a line is no such answer.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path} is no file: give what the engine's answers were written to")
        self.path = path
        self._starts: list[int] = []
        self.sha256 = file_sha256(path)
        texts: set[str] = set()
        with open(path, "rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    self._starts.append(start)
                    texts.add(self._answer(line, len(self._starts)).text)
                start += len(line)
        self.num_duplicates = len(self._starts) - len(texts)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._starts)

    def answers(self, start: int, stop: int) -> list[Answer]:
        """Answers `start` to `stop` (not included)."""
        found = []
        with open(self.path, "rb") as file:
            for idx in range(start, stop):
                file.seek(self._starts[idx])
                found.append(self._answer(file.readline(), idx + 1))
        return found

    def name_of(self, idx: int) -> str:
        """What a message calls a document."""
        return f"{self.path}, document {idx + 1}"

    def _answer(self, line: bytes, number: int) -> Answer:
        try:
            value = json.loads(line)
            return Answer(
                text=value["text"],
                token_ids=value["prompt_token_ids"],
                lists=[None if one is None else _listed(one) for one in value["prompt_logprobs"]],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.name_of(number - 1)} cannot be read ({type(error).__name__}: {error}): "
                "expected a JSON object with text, prompt_token_ids and prompt_logprobs"
            ) from error


def _listed(entry: dict[str, Any]) -> TopLogProbs:
    return {
        int(token_id): float(one["logprob"] if isinstance(one, dict) else one)
        for token_id, one in entry.items()
    }


SUM_TOLERANCE = 1e-3  # of a head's mass above 1
RESOLUTION = 1e-5  # of a tail's mass; what is smaller, rounding made

TopLogProbs = Mapping[int, float]
"""Nats at temperature 1, by token id."""


@dataclass(frozen=True, kw_only=True)
class ListedPositions:
    """What lists say of a document's N positions.

    Attributes:
        reduced: of the N positions.
        largest_sum: of a position's head, 1 at most but for rounding.
        num_below_resolution: positions whose tail is so small that rounding may have made it.
    """

    reduced: ReducedTopK
    largest_sum: float
    num_below_resolution: int


def listed_positions(
    codec: TopKCodec,
    token_ids: np.ndarray,
    lists: Sequence[TopLogProbs | None],
    *,
    used: np.ndarray,
    where: str,
) -> ListedPositions:
    """Heads and tails of a document's positions; the last one, after which nothing comes, is blank.

    Args:
        codec: with 1 as its only temperature and whole heads.
        token_ids: [N].
        lists: [N], of each token given those before it; the first is not read.
        used: [V] bool, the ids of the support.
        where: the document is called in a message.

    Raises:
        ValueError: for a codec of other temperatures, or lists of another number.
        UserError: for a list that is too short, lacks the real token, names an unknown id, or is
            no list of log-probs at temperature 1.
    """
    if codec.temperatures != (1.0,) or codec.top_p is not None:
        raise ValueError("lists of log-probs fill whole heads, at temperature 1 alone")
    if len(lists) != len(token_ids):
        raise ValueError(f"{len(lists)} lists for {len(token_ids)} tokens")
    num, k = len(token_ids), codec.top_k
    ids = np.tile(np.arange(k), (num, 1))
    log_probs = np.full((num, k), -np.inf)
    log_probs[:, 0] = 0.0
    next_log_prob = np.zeros(num)
    for place in range(num - 1):
        at = f"{where}, token {place + 1}"
        found, listed = _sorted(lists[place + 1], k, used, at)
        real = int(token_ids[place + 1])
        if real not in found:
            raise UserError(
                f"{at}: the list lacks the real token {real}, whose log-prob every cache keeps: "
                "ask the engine for the prompt's own log-probs beside the most probable ones"
            )
        ids[place], log_probs[place] = found[:k], listed[:k]
        next_log_prob[place] = listed[np.flatnonzero(found == real)[0]]
    is_known = np.arange(num) < num - 1
    outside = is_known & ~(ids == np.append(token_ids[1:], -1)[:, None]).any(axis=1)
    sums = np.exp(log_probs).sum(axis=1)
    most_left = (codec.support_size - k) * np.exp(log_probs[:, -1])
    _refuse_sums(sums[:-1], most_left[:-1], where)
    tail = np.clip(1.0 - sums, 0.0, most_left)
    tail = np.where(is_known, np.maximum(tail, np.where(outside, np.exp(next_log_prob), 0.0)), 0.0)
    with np.errstate(divide="ignore"):
        tail_r = np.log(tail) - log_probs[:, 0]
    return ListedPositions(
        reduced=ReducedTopK(
            top1_log_prob=log_probs[:, 0].astype(np.float32),
            next_log_prob=next_log_prob.astype(np.float32),
            ids=ids,
            below_max=(log_probs - log_probs[:, :1]).astype(np.float32),
            tail_r=tail_r[:, None],
            # Not known, and read between temperatures only, of which there are none.
            tail_m=np.full((num, 1), np.nan),
        ),
        largest_sum=float(sums[:-1].max(initial=0.0)),
        num_below_resolution=int((is_known & (tail < RESOLUTION)).sum()),
    )


def _sorted(
    listed: TopLogProbs | None, k: int, used: np.ndarray, at: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs, descending, ties to the lower id."""
    num = 0 if listed is None else len(listed)
    if listed is None or num < k:
        raise UserError(
            f"{at}: the list has {num} tokens, expected at least {k}: ask the engine for more, or "
            "cache fewer (top_k)"
        )
    ids = np.fromiter(listed, np.int64, num)
    log_probs = np.fromiter(listed.values(), np.float64, num)
    unknown = ids[~((ids >= 0) & (ids < len(used)) & used[np.clip(ids, 0, len(used) - 1)])]
    if len(unknown):
        raise UserError(
            f"{at}: the id {unknown[0]} is no token of the tokenizer: give the one that the engine "
            "used"
        )
    is_bad = ~(log_probs <= SUM_TOLERANCE)
    if is_bad.any() or np.isneginf(log_probs).all():
        raise UserError(
            f"{at}: {log_probs[np.argmax(is_bad)]:g} is no log-prob: expected numbers up to 0"
        )
    order = np.lexsort((ids, -log_probs))
    return ids[order], log_probs[order]


def _refuse_sums(sums: np.ndarray, most_left: np.ndarray, where: str) -> None:
    """Refuse heads that hold too much, or leave more than the others could hold.

    Args:
        sums: [N] mass of each head.
        most_left: [N] the most that the others can have, none being above the head's last.
        where: the document is called in a message.
    """
    wrong = (sums > 1 + SUM_TOLERANCE) | (1 - sums > most_left + SUM_TOLERANCE)
    if wrong.any():
        place = int(np.argmax(wrong))
        expected = f"{max(0.0, 1 - most_left[place]):.4f} to 1"
        raise UserError(
            f"{where}, token {place + 1}: the probabilities add up to {sums[place]:.4f}, expected "
            f"{expected}: these are not the most probable tokens of one distribution at "
            "temperature 1, so have the engine give them before temperature, penalties and top-p"
        )
