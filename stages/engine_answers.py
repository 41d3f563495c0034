"""What inference engines answered, as files hold it: documents with their tokens' log-probs.

One document a line of JSON, or a row of Parquet. The layouts are those that vLLM 0.32 (offline and
its server), other servers with OpenAI's completions and SGLang write; docs/own-cache.md shows them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import file_sha256

TopLogProbs = Mapping[int, float]
"""Nats, by token id."""

NAMED_ID = "token_id:"  # how a server writes ids in the place of strings
MASKED = -9999.0  # what vLLM writes for minus infinity
FLAT_COLUMNS = ("start_indices", "end_indices", "token_ids", "logprobs")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Tokens that an engine read, and what it said of them.

    Attributes:
        text: of the document; None for a part of a longer text.
        token_ids: [S], as the engine read it, with the special tokens that it added.
        lists: [S], the log-probs of each token given those before it; None for the first.
        is_scored: [S], the tokens that have a list; None: all but the first.
        num_left_out: tokens without one although the engine scored them.
    """

    text: str | None
    token_ids: Sequence[int]
    lists: Sequence[TopLogProbs | None]
    is_scored: np.ndarray | None = None
    num_left_out: int = 0


class AnswerFile(ABC):
    """Answers that lie in a file, read a shard at a time.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        scores_some: whether tokens other than the first may have no list, and lists may be short,
            with all that is at least as probable as their last.
    """

    scores_some: ClassVar[bool] = False

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"{path} is no file: give what the engine's answers were written to")
        self.path = path
        self.sha256 = file_sha256(path)

    @abstractmethod
    def __len__(self) -> int:
        """The number of documents."""

    @abstractmethod
    def answers(self, start: int, stop: int) -> list[Answer]:
        """Answers `start` to `stop` (not included).

        Raises:
            UserError: if one is not as expected.
        """

    def name_of(self, idx: int) -> str:
        """What a message calls a document."""
        return f"{self.path}, document {idx + 1}"


class LogProbFile(AnswerFile):
    """Answers in a JSONL file, one document a line; empty lines do not count.

    Raises:
        UserError: if the file is not there.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._starts: list[int] = []
        with open(path, "rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._starts)

    def answers(self, start: int, stop: int) -> list[Answer]:
        """As of any file."""
        found = []
        with open(self.path, "rb") as file:
            for idx in range(start, stop):
                file.seek(self._starts[idx])
                found.append(_read(file.readline(), self.name_of(idx)))
        return found


class FlatLogProbFile(AnswerFile):
    """Answers in a Parquet file, one document a row, in the layout of vLLM's `FlatLogprobs`.

    Columns: `text`, `prompt_token_ids`, and lists `start_indices` and `end_indices` (of each
    token's entries), `token_ids` and `logprobs` (the entries, end to end).

    Raises:
        UserError: if the file is not there, or no such table.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise UserError(f"{path} is no Parquet file ({error}): write it again") from error
        self._columns = ("text", "prompt_token_ids", *FLAT_COLUMNS)
        missing = [one for one in self._columns if one not in self._file.schema_arrow.names]
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(missing)}: expected text, prompt_token_ids "
                "and the fields of vLLM's FlatLogprobs"
            )
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(one).num_rows for one in groups]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        """The number of documents."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def answers(self, start: int, stop: int) -> list[Answer]:
        """As of any file."""
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right")
        groups = list(range(first, last + 1))
        table = self._file.read_row_groups(groups, columns=list(self._columns))
        offset = int(self._ends[first - 1]) if first else 0
        rows = table.slice(start - offset, stop - start).to_pylist()
        return [self._answer(row, self.name_of(idx)) for idx, row in enumerate(rows, start)]

    @staticmethod
    def _answer(row: dict[str, Any], where: str) -> Answer:
        try:
            entries = list(zip(row["token_ids"], row["logprobs"], strict=True))
            lists = [
                {token_id: _number(log_prob) for token_id, log_prob in entries[start:end]} or None
                for start, end in zip(row["start_indices"], row["end_indices"], strict=True)
            ]
        except (TypeError, ValueError) as error:
            raise _unreadable(where, error) from error
        return _answer(row["text"], row["prompt_token_ids"], lists, where)


def open_answers(path: Path) -> AnswerFile:
    """A file's answers, by its ending: Parquet, or JSON lines.

    Raises:
        UserError: if it is not there, or not what its name says.
    """
    return FlatLogProbFile(path) if path.suffix == ".parquet" else LogProbFile(path)


def _read(line: bytes, where: str) -> Answer:
    try:
        value = json.loads(line)
        if "choices" in value:
            return _of_a_server(value, where)
        if "meta_info" in value:
            return _of_sglang(value, where)
        lists = [_listed(one, where) for one in value["prompt_logprobs"]]
        return _answer(value["text"], value["prompt_token_ids"], lists, where)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} cannot be read ({type(error).__name__}: {error}): expected a JSON object with "
        "text, prompt_token_ids and prompt_logprobs, or a server's response with the text as prompt"
    )


def _answer(text: Any, token_ids: Any, lists: Sequence[TopLogProbs | None], where: str) -> Answer:
    """Of parts that a file may lack.

    Raises:
        UserError: naming what is missing and how to have it.
    """
    if not isinstance(text, str):
        raise UserError(
            f"{where} has no text, expected the document's (engines give none for prompts of ids): "
            "write it beside the answer"
        )
    if token_ids is None:
        raise UserError(
            f"{where} has no prompt_token_ids: ask the server with return_token_ids=true"
        )
    return Answer(text=text, token_ids=[int(one) for one in token_ids], lists=lists)


def _of_a_server(value: dict[str, Any], where: str) -> Answer:
    """A response of vLLM's server, or of another one that knows OpenAI's completions."""
    if len(value["choices"]) != 1:
        raise UserError(
            f"{where} has {len(value['choices'])} choices: write one line a prompt, with one choice"
        )
    choice, text = value["choices"][0], value.get("prompt")
    ids = choice.get("prompt_token_ids")
    if choice.get("prompt_logprobs") is not None:
        lists = [_listed(one, where) for one in choice["prompt_logprobs"]]
        return _answer(text, ids, lists, where)
    echoed = choice.get("logprobs")
    if not echoed or echoed.get("top_logprobs") is None:
        raise UserError(
            f"{where} has neither prompt_logprobs nor an echo's logprobs: the server ignored what "
            "was asked (llama.cpp's does), so take another one"
        )
    answer = _answer(text, ids, (), where)  # refuses ids that are missing
    num = len(answer.token_ids)  # behind them stands what was generated
    lists = [_listed(one, where) for one in echoed["top_logprobs"][:num]]
    for place in range(1, min(num, len(lists))):
        own = echoed["token_logprobs"][place]
        lists[place] = {**(lists[place] or {}), answer.token_ids[place]: _number(own)}
    return Answer(text=answer.text, token_ids=answer.token_ids, lists=lists)


def _of_sglang(value: dict[str, Any], where: str) -> Answer:
    """A response of SGLang's `/generate`, whose `text` is what was generated."""
    found = value["meta_info"]
    if not found.get("input_top_logprobs"):
        raise UserError(
            f"{where} has no input_top_logprobs: ask SGLang with return_logprob=true, "
            "logprob_start_len=0 and top_logprobs_num"
        )
    tokens = found["input_token_logprobs"]
    lists: list[TopLogProbs | None] = [None]
    for token, top in zip(tokens[1:], found["input_top_logprobs"][1:], strict=True):
        entries = [*(top or ()), token]
        lists.append({int(token_id): _number(log_prob) for log_prob, token_id, *_ in entries})
    return _answer(value.get("prompt"), [one[1] for one in tokens], lists, where)


def _listed(entry: dict[str, Any] | None, where: str) -> TopLogProbs | None:
    """A list by ids; None of an empty one, as the flat form has it of the first token."""
    if not entry:
        return None
    return {
        _id_of(key, where): _number(one["logprob"] if isinstance(one, dict) else one)
        for key, one in entry.items()
    }


def _id_of(key: str, where: str) -> int:
    try:
        return int(key.removeprefix(NAMED_ID))
    except ValueError:
        raise UserError(
            f"{where} has lists by strings ({key!r}), and several tokens may be one string: ask "
            "for ids, with prompt_logprobs or return_tokens_as_token_ids=true"
        ) from None


def _number(log_prob: float) -> float:
    return -np.inf if log_prob <= MASKED else float(log_prob)
