"""The tokenizer's corner of a cache's `teacher` folder: written by stage one, read at the join.

tokenizer.json, tokenizer_config.json, ...   what AutoTokenizer.from_pretrained(folder) loads
id_to_string.json                            the string of every id, null where there is none
probe.json                                   a few cached documents, with text and ids
tokenization.json                            the record; last, so that its presence says done
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, ValidationError

from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.tokens.record import (
    TokenizationRecord,
    describe,
    id_to_string,
    table_sha256,
)
from teacher_cache.stages.tokens.tokenizers import save_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

RECORD_FILE = "tokenization.json"
TABLE_FILE = "id_to_string.json"
PROBE_FILE = "probe.json"


class _Document(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def second(self) -> str | None: ...

    @property
    def sample_id(self) -> bytes: ...


class _Sample(Protocol):
    @property
    def input_ids(self) -> Sequence[int] | np.ndarray: ...


class ProbeDocument(StageConfig):
    """A cached document with its text, kept to be tokenized again at the join."""

    sample_id: str  # hex
    text: str
    second: str | None = Field(default=None, exclude_if=lambda text: text is None)  # of a pair
    input_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CachedTokenization:
    """What a cache knows of its own token ids."""

    record: TokenizationRecord
    table: list[str | None]
    probe: tuple[ProbeDocument, ...]


def write_tokenization(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    probe: Sequence[ProbeDocument],
) -> TokenizationRecord:
    """Commit the tokenizer, its record, its table and the probe; equal inputs give equal bytes.

    Each file is replaced whole, the record last: a run that was killed in between writes them
    again.

    Args:
        folder: the cache's `teacher` folder.
        tokenizer: the one that made the cached ids.
        max_length: tokens at which it truncated, special tokens included.
        probe: from `choose_probe`.

    Raises:
        UserError: for a full disk, a read-only file system or a missing permission.
    """
    pairs = any(document.second is not None for document in probe)
    record = describe(tokenizer, max_length=max_length, pairs=pairs)
    save_tokenizer(folder, tokenizer)
    write_json_atomically(folder / TABLE_FILE, id_to_string(tokenizer))
    write_json_atomically(folder / PROBE_FILE, [document.model_dump() for document in probe])
    write_json_atomically(folder / RECORD_FILE, record.model_dump())
    return record


def read_tokenization(folder: Path) -> CachedTokenization:
    """Read back what `write_tokenization` wrote.

    Raises:
        UserError: if a file is missing or cannot be understood.
        CheckFailed: if the table is not the one that the record describes.
    """
    try:
        record = TokenizationRecord.model_validate_json(_read(folder / RECORD_FILE))
        probe = tuple(ProbeDocument(**entry) for entry in _read_json(folder / PROBE_FILE))
    except (ValidationError, TypeError) as error:
        raise UserError(
            f"{folder} holds a tokenization that this version cannot read ({error}); re-run "
            "cache-teacher, or use the version that wrote the cache"
        ) from error
    table = _read_json(folder / TABLE_FILE)
    if table_sha256(table) != record.id_to_string_sha256:
        raise CheckFailed(
            f"{folder / TABLE_FILE} is not the table that {RECORD_FILE} describes: one of them "
            "was changed; re-run cache-teacher, which writes both again"
        )
    return CachedTokenization(record=record, table=table, probe=probe)


def choose_probe(
    documents: Sequence[_Document], samples: Sequence[_Sample], *, num: int = 32
) -> list[ProbeDocument]:
    """Pick the documents that are most likely to show a difference; the same ones every time.

    Half evenly spaced over the corpus, a quarter the longest (truncation), a quarter those with
    the most non-ASCII characters (normaliser). Ties go to the earlier document; the picks stand
    in corpus order.

    Args:
        documents: in corpus order.
        samples: what each document became, in the same order.
        num: how many to pick; all where there are no more.
    """
    total = len(documents)
    spread = num // 2
    even = [pick * total // spread for pick in range(spread)] if total > num else range(total)
    chosen = set(even)
    longest = sorted(range(total), key=lambda idx: -len(samples[idx].input_ids))
    richest = sorted(range(total), key=lambda idx: -_num_non_ascii(documents[idx].text))
    for ranking, quota in ((longest, num // 4), (richest, num - spread - num // 4)):
        fresh = [idx for idx in ranking if idx not in chosen]
        chosen.update(fresh[:quota])
    return [
        ProbeDocument(
            sample_id=documents[idx].sample_id.hex(),
            text=documents[idx].text,
            second=documents[idx].second,
            input_ids=tuple(int(token) for token in samples[idx].input_ids),
        )
        for idx in sorted(chosen)
    ]


def _num_non_ascii(text: str) -> int:
    return len(text) - len(text.encode("ascii", errors="ignore"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, so the cache's tokenization cannot be checked; re-run "
            "cache-teacher with the same settings, which completes the cache"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); re-run cache-teacher, which writes it again"
        ) from error
