"""Atomic commit: a file is either absent, or whole and durable.

Temporary file in the same folder, fsync, rename, fsync of the folder. A kill at any instant
leaves at most a temporary file, which `remove_leftovers` clears on the next start.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teacher_cache.cache.errors import UserError

TEMP_SUFFIX = ".tmp"

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another --out"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --out"),
    errno.EROFS: ("the file system is read-only", "choose another --out"),
    errno.EACCES: ("permission was denied", "choose an --out that you may write to"),
    errno.EPERM: ("permission was denied", "choose an --out that you may write to"),
    errno.EEXIST: ("a file stands where a folder must be", "choose another --out"),
    errno.ENOTDIR: ("a file stands where a folder must be", "choose another --out"),
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into one sentence with a remedy.

    Raises:
        UserError: for a full disk, a read-only file system, a missing permission, or a file in a
            folder's place.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        found, remedy = _REASONS[error.errno]
        raise UserError(
            f"cannot write {path}: {found}; {remedy} (what was committed before is kept, and "
            "the same command resumes from it)"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create the folder and its parents, each entry durable.

    Raises:
        UserError: where the file system refuses.
    """
    with explained(folder):
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            fsync_folder(one.parent)


def temporary_name(name: str) -> str:
    """Name of the file beside `name` in which its next content is written."""
    return f".{name}{TEMP_SUFFIX}"


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole and durable, creating its folder.

    Raises:
        UserError: for a full disk, a read-only file system or a missing permission.
    """
    make_folder(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    with explained(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # there only after a refusal or an interruption
        fsync_folder(path.parent)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def write_json_atomically(path: Path, value: Any) -> None:
    """Commit a value as readable JSON with sorted keys.

    Raises:
        UserError: where the file system refuses.
    """
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes_atomically(path, (text + "\n").encode())


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the temporary files that a killed run left below `folder`; return their paths."""
    leftovers = sorted(folder.rglob(temporary_name("*")))
    with explained(folder):
        for leftover in leftovers:
            leftover.unlink()
    return leftovers
