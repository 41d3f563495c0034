"""What an inference engine wrote of documents: a file, one document a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import file_sha256
from teacher_cache.stages.teacher.log_prob_lists import TopLogProbs


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
