"""After stage two: students and their teacher side by side on documents that neither has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.evaluation.details import Details
from teacher_cache.stages.evaluation.models import EvaluatedModel
from teacher_cache.stages.evaluation.runs import (
    known_task,
    require_distinct_names,
    teacher_beside,
    tokenization_marks,
)
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.models.inference import forward

NUM_REPEATS = 9  # of timing a forward pass


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The table.

    Attributes:
        num_documents: that were not empty; of a cache, whole ones and pieces.
        prompt: the beginning of the first document, with which language models went on; None of
            classifiers, which write nothing.
        rows: classifiers' majority, teacher (unless there is none), then the runs as given; each of
            its task's kind (`Evaluation` or `LanguageModelEvaluation`).
        marks: by row, what a reader must know: a join that was let pass, say.
        details: intervals, bins and disagreements; None of a task that gives none.
    """

    num_documents: int
    prompt: str | None = None
    rows: tuple[Any, ...]
    marks: dict[str, str]
    details: Details | None = None

    def to_json(self) -> dict[str, Any]:
        """As `pipe evaluate --json` writes it: without what there is not."""
        figures = asdict(self)
        for name in ("prompt", "details"):
            if figures[name] is None:
                del figures[name]
        return figures


def run(config: EvaluateConfig, on_step: Callable[[str], None] | None = None) -> EvaluateResult:
    """Evaluate students, and their teacher where it can be had.

    Args:
        config: runs, and documents or a cache.
        on_step: told what is being done.

    Raises:
        UserError: for anything the user can mend: runs, documents, cache, teacher.
        CheckFailed: if the cache's head is damaged or missing.
    """
    say = on_step or (lambda _: None)
    known = known_task(config.runs)
    if config.corpus is None and config.cache is None:
        raise UserError(known.needs_data)
    task = known.evaluation
    require_distinct_names(config.runs, task.row_names)
    students = [task.student.of_run(folder, config) for folder in config.runs]
    # A cache has what its teacher said.
    asked = teacher_beside(config.runs, config) if config.cache is None else None
    held_out = task.read(config, students)
    teacher = None if asked is None else task.teacher.of_teacher(asked)
    scored = held_out.score(teacher, say)

    models = [*([] if teacher is None else [teacher]), *students]
    say("timing one document at a time")
    latency = measure_latency(models, config.latency_lengths)
    costs: dict[str, dict[str, Any]] = {
        one.name: {
            "num_parameters": one.num_parameters,
            "megabytes": one.megabytes,
            "latency_ms": latency[one.name],
        }
        for one in models
    }
    written = held_out.written(models, say)
    if written is not None:
        for name, text in written.by_name.items():
            costs[name]["written"] = text
    return EvaluateResult(
        num_documents=scored.num_documents,
        prompt=None if written is None else written.prompt,
        rows=tuple(replace(row, **costs.get(row.name, {})) for row in scored.rows),
        marks=_joined(tokenization_marks(config.runs), scored.marks),
        details=scored.details,
    )


def _joined(first: Mapping[str, str], then: Mapping[str, str]) -> dict[str, str]:
    """Marks of both, by row."""
    marks = dict(first)
    for name, mark in then.items():
        marks[name] = f"{marks[name]}; {mark}" if name in marks else mark
    return marks


def measure_latency(
    models: Sequence[EvaluatedModel], lengths: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """Milliseconds of one forward pass of one document; medians of interleaved repeats.

    Args:
        models: with distinct names.
        lengths: in tokens; one that a model has no positions for is left out for it.

    Returns:
        By name, by length.
    """
    generator = np.random.default_rng(0)
    found: dict[str, dict[int, float]] = {one.name: {} for one in models}
    for length in lengths:
        timed = [one for one in models if length <= one.num_positions]
        durations: dict[str, list[float]] = {one.name: [] for one in timed}
        for repeat in range(NUM_REPEATS + 1):
            for one in timed:
                ids = generator.integers(0, one.model.config.vocab_size, (1, length))
                duration = _time_forward(one, torch.from_numpy(ids))
                if repeat > 0:  # the first pass allocates
                    durations[one.name].append(1000 * duration)
        for name, values in durations.items():
            found[name][length] = median(values)
    return found


def _time_forward(one: EvaluatedModel, input_ids: torch.Tensor) -> float:
    input_ids = input_ids.to(one.model.device)
    mask = torch.ones_like(input_ids)
    started = time.perf_counter()
    forward(one.model, input_ids, mask, one.autocast).cpu()  # waits for the device
    return time.perf_counter() - started
