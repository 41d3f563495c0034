"""Checkpoints that are committed: complete with hashes, or skipped by name when a run resumes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from teacher_cache.cache.commit import explained, fsync_folder, write_json_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import hash_files

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
