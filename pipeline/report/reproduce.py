"""The commands that make again what a report shows, read from what runs and caches record."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teacher_cache.stages.config import flag_of
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import RunRecord


def student_command(run: Path, record: RunRecord) -> str:
    """`pipe train-student` with the options that differ from their defaults.

    Run where the cache lies, it finds the run complete: same settings, same folder.

    Args:
        run: the student's folder.
        record: of it.
    """
    words = ["pipe", "train-student", "--cache", record.about["cache"], "--out", str(run)]
    for name, value in changed_settings(record).items():
        if isinstance(value, bool):
            words.append(flag_of(name) if value else "--no-" + flag_of(name).removeprefix("--"))
        else:
            words += [flag_of(name), _as_typed(value)]
    return shlex.join(words)


def changed_settings(record: RunRecord) -> dict[str, Any]:
    """A student's settings that are options with another value than their default."""
    plain = TrainStudentConfig.of().model_dump(mode="json")  # flat
    options = TrainStudentConfig.options()
    recorded = dict(record.settings)
    if "start" in record.about:  # of a pre-trained student, recorded by what it is
        recorded["arch"] = record.about["start"]
    return {
        name: value
        for name, value in recorded.items()
        if name in options and value is not None and value != plain.get(name)
    }


def evaluate_command(runs: Sequence[Path], cache: Path) -> str:
    """`pipe evaluate` on what the runs held out of their cache."""
    return shlex.join(["pipe", "evaluate", *map(str, runs), "--cache", str(cache)])


def _as_typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)
