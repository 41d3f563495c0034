"""Atomic commit: a file is either absent, or whole and durable.

Temporary file in the same folder, fsync, rename, fsync of the folder. A kill at any instant
leaves at most a temporary file or folder, which `remove_leftovers` clears on the next start.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teacher_cache.cache.errors import UserError

TEMP_SUFFIX = ".tmp"
_TOKEN_BYTES = 4

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another --out"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --out"),
    errno.EROFS: ("the file system is read-only", "choose another --out"),
    errno.EACCES: ("permission was denied", "choose an --out that you may write to"),
    errno.EPERM: ("permission was denied", "choose an --out that you may write to"),
    errno.EEXIST: ("a file stands where a folder must be", "choose another --out"),
    errno.ENOENT: ("nothing can be made there", "choose another path"),
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
    """A name beside `name` in which its next content is written.

    Another at each call: where two processes write one file (a worker that was given up and was
    only frozen, say), neither may rename what the other has half-written.
    """
    return f".{name}.{secrets.token_hex(_TOKEN_BYTES)}{TEMP_SUFFIX}"


def is_temporary_of(name: str, found: str) -> bool:
    """Whether a file called `found` is what a killed run left of one called `name`.

    Earlier releases wrote no token.
    """
    token = rf"(\.[0-9a-f]{{{2 * _TOKEN_BYTES}}})?"
    return re.fullmatch(rf"\.{re.escape(name)}{token}{re.escape(TEMP_SUFFIX)}", found) is not None


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole and durable, creating its folder.

    Raises:
        UserError: for a full disk, a read-only file system, a missing permission, or where a folder
            or a device stands: a rename would put a file in its place.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"cannot write {path}: it is {kind}; give the path of a file")
    make_folder(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    with explained(path):
        try:
            _write_durably(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # there only after a refusal or an interruption
        fsync_folder(path.parent)


def replace_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Replace the folder `path` by one of these files, whole and durable.

    It is filled under a temporary name. A folder that stood in its place makes room for it under
    another: a kill between the two leaves none, and never one of old and new files.

    Args:
        path: of the folder.
        files: their bytes by relative path.

    Raises:
        UserError: for a full disk, a read-only file system or a missing permission.
    """
    make_folder(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    retired = path.with_name(temporary_name(f"{path.name}.retired"))
    with explained(path):
        try:
            folders = {temporary}
            for name, data in files.items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                _write_durably(file, data)
                folders.update(one for one in file.parents if one.is_relative_to(temporary))
            for folder in folders:
                fsync_folder(folder)
            _take_place(temporary, path, retired)
        finally:
            _remove(temporary)
        fsync_folder(path.parent)
        _remove(retired)


def _take_place(temporary: Path, path: Path, retired: Path) -> None:
    """Rename a folder to `path`; what stands there, by whomever, becomes `retired` before."""
    while True:
        if path.exists():
            _remove(retired)
            os.replace(path, retired)
        try:
            return os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # another process was faster with the same folder: it makes room in turn


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    """Delete temporary files and folders that a killed run left in `folder`; return their paths."""
    leftovers = sorted(folder.rglob(f".*{TEMP_SUFFIX}"))
    with explained(folder):
        for leftover in leftovers:
            _remove(leftover)
    return leftovers
