"""The folder of a training run: its settings, its state, and what it ended with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.commit import explained, temporary_name, write_json_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import refuse_changed_settings
from teacher_cache.cache.lock import LOCK_NAME, writer_lock
from teacher_cache.stages.training.processes import outcome_of_main

RUN_NAME = "run.json"
CHECKPOINTS = "checkpoints"

# What may stand in a folder that is about to become a run.
_OURS = (LOCK_NAME, temporary_name(RUN_NAME))


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`run.json`: of a student's training, or of a teacher's fine-tuning.

    Attributes:
        settings: all that changes the result; no paths, no device.
        about: facts that a reader wants: where the cache and the teacher lie, say.
        complete: whether the model in the folder is the result.
        result: steps, metrics and times of the finished run.
    """

    settings: dict[str, Any]
    about: dict[str, Any]
    complete: bool = False
    result: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Commit it atomically.

        Raises:
            UserError: where the file system refuses.
        """
        write_json_atomically(folder / RUN_NAME, _json_ready(asdict(self)))


def read_run(folder: Path) -> RunRecord:
    """Read a run's record.

    Raises:
        UserError: if the folder is no run.
    """
    path = folder / RUN_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} is no run (it has no {RUN_NAME}): give a folder that `pipe train-student` "
            "or `pipe finetune-teacher` wrote"
        )
    try:
        return RunRecord(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): train again with --resume never") from error


@contextmanager
def locked_run(folder: Path, record: RunRecord, *, start_again: bool) -> Iterator[RunRecord]:
    """Hold the run's lock and `open_run` it: the main process does, all get what it found.

    Raises:
        UserError: in all processes, where another command trains in this folder or `open_run`
            refuses.
    """
    with ExitStack() as held:

        def open_locked() -> RunRecord:
            held.enter_context(writer_lock(folder))
            return open_run(folder, record, start_again=start_again)

        yield outcome_of_main(open_locked)


def open_run(folder: Path, record: RunRecord, *, start_again: bool) -> RunRecord:
    """Create the run's folder, or find it again with the same settings.

    Args:
        folder: of the run.
        record: what this command asks for.
        start_again: remove what is there.

    Returns:
        The recorded state: complete, if an earlier command finished the run.

    Raises:
        UserError: if the folder holds something else, or a run with other settings.
    """
    if (folder / RUN_NAME).exists() and start_again:
        # Before the record is replaced: a kill must not leave them to the new settings.
        with explained(folder):
            if (folder / CHECKPOINTS).exists():
                shutil.rmtree(folder / CHECKPOINTS)
    elif (folder / RUN_NAME).exists():
        recorded = read_run(folder)
        refuse_changed_settings(
            folder,
            recorded.settings,
            record.settings,
            start_again="--resume never (--set train_student.resume=never in `pipe run`)",
        )
        return recorded
    elif folder.exists() and any(one.name not in _OURS for one in folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and holds no {RUN_NAME}, so it is no run: give another --out"
        )
    record.write(folder)
    return record


def _json_ready(value: Any) -> Any:
    """The value with `inf` and `nan`, which JSON has no numbers for, as words.

    A float16 training logs infinite gradient norms while its loss scale settles.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _json_ready(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_json_ready(one) for one in value]
    return value
