"""The task of runs, by what they record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teacher_cache.stages.evaluation.classification import Classification
from teacher_cache.stages.evaluation.language_modeling import LanguageModeling
from teacher_cache.stages.evaluation.runs import task_of
from teacher_cache.stages.evaluation.task import EvaluationTask

TASKS: dict[str, EvaluationTask[Any]] = {
    one.name: one for one in (Classification(), LanguageModeling())
}


def evaluation_task(runs: Sequence[Path]) -> EvaluationTask[Any]:
    """What evaluates these students.

    Raises:
        UserError: if one is no run, or they are of several tasks.
    """
    return TASKS[task_of(runs)]
