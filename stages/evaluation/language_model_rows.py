"""Rows of a comparison of language models, and what may be compared with what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.evaluation.language_model import LanguageModel, TeacherModel
from teacher_cache.stages.evaluation.packed_text import PackedRow, num_bytes_by_id
from teacher_cache.stages.evaluation.scores import Score


@dataclass(frozen=True, kw_only=True)
class LanguageModelEvaluation:
    """One row of the comparison; None where a column does not apply. Means over positions.

    Attributes:
        name: `teacher`, or the run's folder name.
        num_positions: that count: those with a next token in their document.
        nll: negative log-likelihood of the next token, nats.
        perplexity: `exp(nll)`; of tokens, so only models of one tokenizer compare.
        bits_per_byte: negative log2-likelihood a byte of the predicted tokens' text.
        agreement: share of positions with the teacher's most probable token.
        kl: from the teacher's distribution, nats.
        num_parameters: embeddings included.
        megabytes: of the parameters, 10**6 bytes.
        latency_ms: milliseconds of one forward pass of one document, by length in tokens.
        written: what it writes, taking the most probable token, behind the result's `prompt`.
    """

    name: str
    num_positions: int
    nll: float
    perplexity: float
    bits_per_byte: float | None = None
    agreement: float | None = None
    kl: float | None = None
    num_parameters: int | None = None
    megabytes: float | None = None
    latency_ms: dict[int, float] | None = None
    written: str | None = None


def evaluation_of(
    model: LanguageModel, rows: Sequence[PackedRow], its_score: Score, marks: dict[str, str]
) -> LanguageModelEvaluation:
    """A row of the table; `marks` is told what is not exact about it."""
    num = num_positions(rows)
    try:
        sizes, caveat = num_bytes_by_id(model.tokenizer)
    except UserError:
        sizes, caveat = None, "its tokenizer does not tell the bytes of a token"
    bits = None
    if sizes is not None:
        num_bytes = sum(int(sizes[row.next_ids].sum()) for row in rows)
        bits = its_score.nll * num / math.log(2) / num_bytes if num_bytes else None
    if caveat is not None:
        marks[model.name] = f"bits a byte: {caveat}"
    return LanguageModelEvaluation(
        name=model.name,
        num_positions=num,
        nll=its_score.nll,
        perplexity=its_score.perplexity,
        bits_per_byte=bits,
        agreement=its_score.agreement,
        kl=its_score.kl,
    )


def require_positions(name: str, rows: Sequence[PackedRow]) -> None:
    """Refuse text that predicts nothing.

    Raises:
        UserError: saying for whom.
    """
    if not num_positions(rows):
        raise UserError(f"no token of the text has a next one for {name} to predict: give more")


def num_positions(rows: Sequence[PackedRow]) -> int:
    """How many positions count."""
    return sum(int(row.loss_mask.sum()) for row in rows)


def reads_as(
    teacher: TeacherModel,
    own: Sequence[PackedRow],
    student: LanguageModel,
    rows: Sequence[PackedRow],
) -> bool:
    """Whether a student gets the teacher's samples, id by id, and its ids mean the same."""
    ids = student.tokenizer.get_vocab()
    return (
        len(own) == len(rows)
        and all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(own, rows, strict=True))
        and all(ids.get(token) == one for token, one in teacher.tokenizer.get_vocab().items())
    )
