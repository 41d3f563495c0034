"""The tasks of stage one by their names, as the command line and manifests give them."""

from __future__ import annotations

from typing import Any

from teacher_cache.stages.teacher.classification import Classification
from teacher_cache.stages.teacher.language_modeling import LanguageModeling
from teacher_cache.stages.teacher.task import Task

TASKS: dict[str, type[Task[Any, Any]]] = {
    "classification": Classification,
    "lm": LanguageModeling,
}
