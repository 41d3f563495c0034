"""The runs that an evaluation is given: finished ones of one task, each under a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.evaluation.config import EvaluateOptions
from teacher_cache.stages.tasks import DEFAULT_TASK, TASKS, KnownTask, task_named
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.training.batches import held_out
from teacher_cache.stages.training.run_folder import PAIR, RunRecord, read_run


def finished_run(run: Path) -> RunRecord:
    """The record of a run whose model is its result.

    Raises:
        UserError: if the folder is no run, or its training has not ended.
    """
    record = read_run(run)
    if not record.complete:
        raise UserError(f"{run} is not finished: run the command that began it again, it resumes")
    return record


def finished_student(run: Path) -> RunRecord:
    """The record of a student's run whose model is its result.

    Raises:
        UserError: as `finished_run`, or if it is a teacher's.
    """
    record = finished_run(run)
    if "cache_fingerprint" not in record.settings:
        raise UserError(
            f"{run} is the run of a teacher (pipe finetune-teacher): give a student's, which "
            "`pipe train-student` wrote"
        )
    return record


def pair_of(record: RunRecord) -> tuple[str, ...] | None:
    """Columns of the two texts that a document was to a run's teacher; None of single texts."""
    found = record.about.get(PAIR)
    return None if found is None else tuple(found)


def known_task(runs: Sequence[Path]) -> KnownTask:
    """What all these students do.

    Raises:
        UserError: if one is no run, or they are of several tasks.
    """
    tasks: dict[str, Path] = {}
    for folder in runs:
        # The record of a classifier does not say it.
        name = read_run(folder).settings.get("task", DEFAULT_TASK)
        tasks.setdefault(task_named(name, folder).name, folder)
    if len(tasks) > 1:
        named = [f"{tasks[name]} is {TASKS[name].kind}" for name in sorted(tasks, reverse=True)]
        raise UserError(f"{' and '.join(named)}: compare models of one task")
    return TASKS[next(iter(tasks))]


def require_distinct_names(runs: Sequence[Path], reserved: Sequence[str]) -> None:
    """Refuse two rows of one name.

    Raises:
        UserError: naming the folder to rename.
    """
    names = Counter([*reserved, *(folder.name for folder in runs)])
    taken = [folder for folder in runs if names[folder.name] > 1]
    if taken:
        raise UserError(
            f"the table names a run by its folder, and {taken[0].name!r} is there twice: rename "
            f"{taken[0]}"
        )


def _teacher_of(runs: Sequence[Path]) -> str:
    """Where the teacher lies that all these runs learned from.

    Raises:
        UserError: if there are several.
    """
    names = {read_run(folder).about["teacher"] for folder in runs}
    if len(names) > 1:
        raise UserError(
            f"the runs have different teachers ({', '.join(sorted(names))}): name one with "
            "--teacher, or evaluate them apart"
        )
    return names.pop()


def _cached_length(runs: Sequence[Path]) -> int:
    """Tokens of the longest sample as the runs' teacher saw it."""
    return max(read_run(folder).about["teacher_max_length"] for folder in runs)


def teacher_beside(runs: Sequence[Path], options: EvaluateOptions) -> TeacherConfig | None:
    """The teacher that these runs are compared with; None where none is wanted.

    Raises:
        UserError: if they have several and none is named.
    """
    if options.teacher == "none":
        return None
    return TeacherConfig(
        teacher=options.teacher or _teacher_of(runs),
        # As the students' cache saw it; another teacher reads what it can.
        max_length=_cached_length(runs) if options.teacher is None else None,
        device=options.device,
        dtype=options.dtype,
        batch_tokens=options.batch_tokens,
        trust_remote_code=options.trust_remote_code,
    )


def tokenization_marks(runs: Sequence[Path]) -> dict[str, str]:
    """By run, what its join let pass."""
    tokenizations = {folder.name: read_run(folder).about["tokenization"] for folder in runs}
    return {
        name: f"trained although {', '.join(differences)} differed from the cache's"
        for name, differences in tokenizations.items()
        if differences != "verified"
    }


def held_out_of(runs: Sequence[Path], reader: CacheReader) -> np.ndarray | None:
    """[N] bool: what no run that was trained on this cache has seen; None where none was.

    Raises:
        UserError: if that is nothing.
    """
    settings = {folder: read_run(folder).settings for folder in runs}
    own = {
        folder: float(one["eval_fraction"])
        for folder, one in settings.items()
        if one["cache_fingerprint"] == reader.manifest.fingerprint
    }
    if not own:
        return None
    folder, fraction = min(own.items(), key=lambda item: item[1])  # a smaller share is in a larger
    chosen = held_out(reader.sample_ids(), fraction)
    if not chosen.any():
        raise UserError(
            f"{folder} was trained on all of {reader.cache} (--eval-fraction {fraction:g} held out "
            "no sample): give text with --data, or a cache of other text"
        )
    return chosen
