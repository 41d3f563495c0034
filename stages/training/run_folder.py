"""The folder of a training run: its settings, its state, and what it ended with.

Checkpoints in it are committed: complete with hashes, or skipped by name when a run resumes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from teacher_cache.cache.commit import (
    explained,
    fsync_folder,
    is_temporary_of,
    remove_leftovers,
    write_json_atomically,
)
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import hash_files, refuse_changed_settings
from teacher_cache.cache.lock import LOCK_NAME, writer_lock
from teacher_cache.stages.processes import outcome_of_main

RUN_NAME = "run.json"
CHECKPOINTS = "checkpoints"
PAIR = "pair"
"""Of what a run is about: the columns of a pair, where its documents are pairs of texts."""


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


HELD_OUT = "eval_"
"""With which transformers' Trainer begins the names of what it measured."""
_CLOCK = ("runtime", "per_second")


def is_clock(name: str) -> bool:
    """Whether a logged figure is of the machine's speed."""
    return name.endswith(_CLOCK)


def held_out_figures(record: RunRecord) -> dict[str, float]:
    """What a training measured last of what it held out; empty where it held nothing out."""
    found = (record.result or {}).get("evaluation") or {}
    return {
        name.removeprefix(HELD_OUT): value
        for name, value in found.items()
        if name.startswith(HELD_OUT) and not is_clock(name)
    }


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
        remove_leftovers(folder)
        return recorded
    elif folder.exists() and not all(map(_is_ours, folder.iterdir())):
        raise UserError(
            f"{folder} is not empty and holds no {RUN_NAME}, so it is no run: give another --out"
        )
    remove_leftovers(folder)
    record.write(folder)
    return record


def _is_ours(path: Path) -> bool:
    """Whether it may stand in a folder that is about to become a run."""
    return path.name == LOCK_NAME or is_temporary_of(RUN_NAME, path.name)


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


MARKER_NAME = "committed.json"
NUM_KEPT = 2

logger = logging.getLogger(__name__)


# safetensors writes under such a name, and then gives the file its own.
_HALF_WRITTEN = re.compile(r"\.tmp[0-9A-Za-z]{6}")


@contextmanager
def saved(folder: Path) -> Iterator[None]:
    """Save models and states in the body; at its end all files below `folder` are durable.

    What a save that was killed left half-written goes first.

    Raises:
        UserError: where the file system refuses, in the words of whichever library noticed.
    """
    with explained_save(folder):
        for path in folder.glob(".tmp*"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink()
        yield
    make_durable(folder)


@contextmanager
def explained_save(folder: Path) -> Iterator[None]:
    """Save models and states in the body.

    Raises:
        UserError: where the file system refuses, in the words of whichever library noticed.
    """
    with explained(folder):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:  # torch.save's, safetensors'
            raise UserError(
                f"cannot write {folder} ({str(error).splitlines()[0]}): if the disk is full, free "
                "some space or choose another --out (what was committed before is kept, and the "
                "same command resumes from it)"
            ) from error


def make_durable(folder: Path) -> None:
    """Have all files below a folder survive a power cut.

    Raises:
        UserError: where the file system refuses.
    """
    with explained(folder):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        fsync_folder(folder)


def commit_checkpoint(checkpoint: Path) -> None:
    """Write the marker with the hashes of a checkpoint's files, which are durable.

    Raises:
        UserError: where the file system refuses.
    """
    write_json_atomically(checkpoint / MARKER_NAME, hash_files(checkpoint))
    fsync_folder(checkpoint.parent)


def is_committed(checkpoint: Path) -> bool:
    """Whether the marker is there and every file has the hash it names."""
    marker = checkpoint / MARKER_NAME
    if not marker.is_file():
        return False
    try:
        recorded = json.loads(marker.read_text())
    except ValueError:
        return False
    found = hash_files(checkpoint)
    return all(found.get(name) == sha256 for name, sha256 in recorded.items())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest committed checkpoint of a run; names each newer one that it skips."""
    for checkpoint in reversed(_checkpoints(folder)):
        if is_committed(checkpoint):
            return checkpoint
        logger.warning("skipped %s: it is not complete or was changed", checkpoint)
    return None


def require_committed(checkpoint: Path) -> Path:
    """A checkpoint that was named by hand.

    Raises:
        UserError: if it is missing, incomplete or changed.
    """
    if not is_committed(checkpoint):
        raise UserError(
            f"{checkpoint} is no complete checkpoint (its {MARKER_NAME} is missing or a file "
            "differs from its hash): give another, or --resume auto for the newest complete one"
        )
    return checkpoint


def remove_old_checkpoints(folder: Path, *, keep: Path | None) -> None:
    """Keep the newest two committed checkpoints, `keep`, and nothing else that is older.

    Raises:
        UserError: where the file system refuses.
    """
    found = _checkpoints(folder)
    committed = [one for one in found if (one / MARKER_NAME).is_file()]
    if len(committed) < NUM_KEPT:
        return
    for old in found[: found.index(committed[-NUM_KEPT])]:
        if keep is None or old.resolve() != keep.resolve():
            remove_checkpoint(old)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, or what is left of one, if it is there.

    Raises:
        UserError: where the file system refuses.
    """
    with explained(checkpoint):
        # Its marker first: a kill in between must not leave half a checkpoint.
        (checkpoint / MARKER_NAME).unlink(missing_ok=True)
        if checkpoint.exists():
            shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    found = [
        (int(match.group(1)), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]
