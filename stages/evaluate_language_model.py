"""After stage two: language models and their teacher side by side on text that neither has seen.

The teacher's part comes from running it over the text, or from a cache, which needs no teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.evaluation.config import EvaluateOptions, GenerationOptions
from teacher_cache.stages.evaluation.generation import continuation, prompt_ids
from teacher_cache.stages.evaluation.latency import measure_latency
from teacher_cache.stages.evaluation.models import (
    TEACHER,
    LanguageModel,
    load_student_language_model,
    load_teacher_language_model,
)
from teacher_cache.stages.evaluation.packed_text import PackedRow, documents_with_text, packed_rows
from teacher_cache.stages.evaluation.references import CachedReference, LiveReference
from teacher_cache.stages.evaluation.runs import (
    held_out_of,
    require_distinct_names,
    teacher_beside,
    tokenization_marks,
)
from teacher_cache.stages.evaluation.scores import (
    LanguageModelEvaluation,
    evaluation_of,
    num_positions,
    reads_as,
    require_positions,
    score,
)
from teacher_cache.stages.models.device import resolve_device

PROMPT_TOKENS = 16
NEW_TOKENS = 32


class EvaluateLanguageModelConfig(EvaluateOptions):
    """Everything the evaluation needs, resolved: no preset. Text or a cache, one of the two."""

    runs: tuple[Path, ...] = Field(min_length=1, description="Folders of trained students.")
    corpus: CorpusConfig | None = Field(default=None, description="Text to evaluate on.")
    cache: Path | None = Field(default=None, description="Cache to evaluate on.")


@dataclass(frozen=True, kw_only=True)
class EvaluateLanguageModelResult:
    """The table.

    Attributes:
        num_documents: that were not empty; of a cache, whole ones and pieces.
        prompt: the beginning of the first document, with which the models went on.
        rows: teacher (unless there is none), then the runs as given.
        marks: by row, what a reader must know.
    """

    num_documents: int
    prompt: str
    rows: tuple[LanguageModelEvaluation, ...]
    marks: dict[str, str]


def run(
    config: EvaluateLanguageModelConfig, on_step: Callable[[str], None] | None = None
) -> EvaluateLanguageModelResult:
    """Evaluate students, and their teacher where it can be had.

    Args:
        config: runs, and text or a cache.
        on_step: told what is being done.

    Raises:
        UserError: for anything the user can mend: runs, text, cache, teacher.
        CheckFailed: if the cache's head is damaged or missing.
    """
    say = on_step or (lambda _: None)
    require_distinct_names(config.runs, [TEACHER])
    students = [load_student_language_model(folder, config) for folder in config.runs]
    if config.cache is not None:
        found = _on_cache(config, config.cache, students, say)
    elif config.corpus is not None:
        found = _on_text(config, config.corpus, students, say)
    else:
        raise UserError("evaluate needs --data: text that the student has not seen; or --cache")
    say("timing one document at a time")
    latency = measure_latency(found.models, config.latency_lengths)
    by_name = {one.name: one for one in found.models}
    say("writing")
    prompt = _prompt(students[0], found.rows_read)
    rows = [
        replace(
            row,
            latency_ms=latency[row.name],
            written=_written(by_name[row.name], prompt),
            num_parameters=by_name[row.name].num_parameters,
            megabytes=by_name[row.name].megabytes,
        )
        if row.name in by_name
        else row
        for row in found.rows
    ]
    marks = tokenization_marks(config.runs)
    for name, mark in found.marks.items():
        marks[name] = "; ".join([*([marks[name]] if name in marks else []), mark])
    return EvaluateLanguageModelResult(
        num_documents=found.num_documents, prompt=prompt, rows=tuple(rows), marks=marks
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Scores without what they cost.

    Attributes:
        models: those that are here, in the order of their rows.
        rows_read: by the first student.
    """

    models: list[LanguageModel]
    rows: list[LanguageModelEvaluation]
    rows_read: Sequence[PackedRow]
    num_documents: int
    marks: dict[str, str]


def _on_text(
    config: EvaluateLanguageModelConfig,
    corpus: CorpusConfig,
    students: list[LanguageModel],
    say: Callable[[str], None],
) -> _Found:
    """Pack the text for each model; the teacher beside those that read the very same samples."""
    documents = documents_with_text(load_corpus(corpus))
    packed = [packed_rows(documents, one.tokenizer, max_length=one.max_length) for one in students]
    for student, rows in zip(students, packed, strict=True):
        require_positions(student.name, rows)
    asked = teacher_beside(config.runs, config)
    teacher = None if asked is None else load_teacher_language_model(asked)
    marks: dict[str, str] = {}
    rows_by_name: dict[str, LanguageModelEvaluation] = {}
    beside: list[int] = []
    if teacher is not None:
        own = packed_rows(documents, teacher.tokenizer, max_length=teacher.max_length)
        beside = [i for i, one in enumerate(students) if reads_as(teacher, own, one, packed[i])]
        together = [students[i] for i in beside]
        say(f"reading {num_positions(own):,} positions with {_listed([teacher, *together])}")
        reference = LiveReference(teacher=teacher, rows=own)
        scores = score(together, own, reference, batch_tokens=config.batch_tokens)
        assert scores.teacher is not None, "there is a reference"
        of_teacher = evaluation_of(teacher, own, scores.teacher, marks)
        rows_by_name[TEACHER] = of_teacher
        for one, its_score in zip(together, scores.models, strict=True):
            rows_by_name[one.name] = evaluation_of(one, own, its_score, marks)
    for i, one in enumerate(students):
        if i in beside:
            continue
        say(f"reading {num_positions(packed[i]):,} positions with {one.name}")
        scores = score([one], packed[i], None, batch_tokens=config.batch_tokens)
        rows_by_name[one.name] = evaluation_of(one, packed[i], scores.models[0], marks)
        if teacher is not None:
            marks[one.name] = (
                "reads other samples than the teacher (tokenizer or --max-length), so there is no "
                "KL or agreement: compare bits a byte"
            )
    models = [*([teacher] if teacher else []), *students]
    return _Found(
        models=models,
        rows=[rows_by_name[one.name] for one in models],
        rows_read=packed[0],
        num_documents=len(documents),
        marks=marks,
    )


def _on_cache(
    config: EvaluateLanguageModelConfig,
    cache: Path,
    students: list[LanguageModel],
    say: Callable[[str], None],
) -> _Found:
    """The cache's samples, or where a run was trained on it those that the runs held out."""
    if config.teacher not in (None, "none"):
        raise UserError(
            f"--teacher {config.teacher} is run over text, and --cache has what the teacher said: "
            "leave one of them out"
        )
    for one in students[1:]:
        if one.tokenizer.get_vocab() != students[0].tokenizer.get_vocab():
            raise UserError(
                f"{one.name} and {students[0].name} have different tokenizers: evaluate them on "
                "--cache apart"
            )
    reader = CacheReader(cache)
    reference = CachedReference.of_cache(
        reader,
        students[0].tokenizer,
        held_out=held_out_of(config.runs, reader),
        device=resolve_device(config),
    )
    require_positions(str(cache), reference.rows)
    say(f"reading {num_positions(reference.rows):,} positions with {_listed(students)}")
    scores = score(students, reference.rows, reference, batch_tokens=config.batch_tokens)
    assert scores.teacher is not None, "there is a reference"
    marks: dict[str, str] = {}
    rows = [
        evaluation_of(one, reference.rows, its_score, marks)
        for one, its_score in zip(students, scores.models, strict=True)
    ]
    # Of one tokenizer, so a byte is worth as much to each.
    per_nat = None if rows[0].bits_per_byte is None else rows[0].bits_per_byte / rows[0].nll
    of_teacher = LanguageModelEvaluation(
        name=TEACHER,
        num_positions=scores.num_positions,
        nll=scores.teacher.nll,
        perplexity=scores.teacher.perplexity,
        bits_per_byte=None if per_nat is None else per_nat * scores.teacher.nll,
    )
    return _Found(
        models=students,
        rows=[of_teacher, *rows],
        rows_read=reference.rows,
        num_documents=sum(len(row.lengths) for row in reference.rows),
        marks=marks,
    )


def _listed(models: Sequence[LanguageModel]) -> str:
    return ", ".join(one.name for one in models)


def _prompt(model: LanguageModel, rows: Sequence[PackedRow]) -> str:
    """The beginning of the first document that has a next token."""
    documents = (
        ids
        for row in rows
        for ids in np.split(row.input_ids, np.cumsum(row.lengths)[:-1])
        if len(ids) > 1
    )
    beginning = next(documents)[:PROMPT_TOKENS].tolist()
    return str(model.tokenizer.decode(beginning, skip_special_tokens=True))


def _written(model: LanguageModel, prompt: str) -> str | None:
    """What a model goes on with; None where it cannot."""
    if not prompt.strip():
        return None
    ids = prompt_ids(model, prompt)
    num_new = int(min(NEW_TOKENS, model.num_positions - len(ids)))
    if num_new < 1:
        return None
    return continuation(model, ids, GenerationOptions(max_new_tokens=num_new))
