"""Who may write a cache: one process, or one a slice; locks name their owner.

The kernel releases a lock should its process die, so a lock file that stayed locks nothing.
Processes that work on slices of one cache take turns, under the cache's own lock, at what they
share (manifest, index, teacher files), and hold their slice's lock while they make shards.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from teacher_cache.cache.commit import explained, make_folder
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import Share

LOCK_NAME = "writer.lock"
_SLICE_LOCK = re.compile(r"slice-(\d+)-of-(\d+)\.lock")
_POLL_S = 0.05
_PATIENCE_S = 5.0  # with a lock whose owner does not say that it is a slice: it may just begin


def is_lock(name: str) -> bool:
    """Whether a file of a cache is called as a lock is."""
    return name == LOCK_NAME or _SLICE_LOCK.fullmatch(name) is not None


@contextmanager
def writer_lock(cache: Path) -> Iterator[None]:
    """Hold the cache's writer lock.

    Raises:
        UserError: when another process writes this cache, or a slice of it, naming host and
            process.
    """
    make_folder(cache)
    with _held(cache / LOCK_NAME, _acquire(cache / LOCK_NAME), slice_name=None):
        for share, owner in live_slices(cache).items():
            raise _refusal(cache, f"slice {share}: {owner}")
        yield


@contextmanager
def turn(cache: Path, share: Share) -> Iterator[None]:
    """Wait for what slices share, and hold it.

    Raises:
        UserError: when one process writes the whole cache, naming host and process.
    """
    make_folder(cache)
    path = cache / LOCK_NAME
    patient_until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            descriptor = _acquire(path)
        except UserError:
            if not _is_slices_turn(path) and time.monotonic() > patient_until:
                raise
            time.sleep(_POLL_S)
        else:
            break
    with _held(path, descriptor, slice_name=str(share)):
        yield


@contextmanager
def slice_lock(cache: Path, share: Share) -> Iterator[None]:
    """Hold the lock of a slice; to be taken in its turn.

    Raises:
        UserError: when another process writes the same slice, or one of other slices, naming both.
    """
    for other, owner in live_slices(cache).items():
        if other == share:
            raise _refusal(cache, f"slice {share}: {owner}")
        if other.num != share.num:
            raise UserError(
                f"{cache} is being written in {other.num} slices (slice {other}: {owner}), and "
                f"this is slice {share}: wait for them to end, or give a slice of {other.num}"
            )
    path = cache / f"slice-{share.idx}-of-{share.num}.lock"
    with _held(path, _acquire(path), slice_name=str(share)):
        yield


def live_slices(cache: Path) -> dict[Share, str]:
    """The slices that are being written by processes now, each with its owner."""
    found = {}
    for path in sorted(cache.iterdir()):
        name = _SLICE_LOCK.fullmatch(path.name)
        owner = _owner_of(path) if name else None
        if name and owner is not None:
            found[Share(idx=int(name[1]), num=int(name[2]))] = owner
    return found


@contextmanager
def _held(path: Path, descriptor: int, *, slice_name: str | None) -> Iterator[None]:
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        if slice_name is not None:
            owner["slice"] = slice_name
        with explained(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(owner).encode())
        yield
    finally:
        # Unlinked while it is held, so a waiting process sees that its file is no longer the lock.
        # Where that is refused (a disk gone read-only) the file stays, and locks nothing.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        with explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            raise _refusal(path.parent, owner) from error
        if _is_current(descriptor, path):
            return descriptor
        os.close(descriptor)


def _refusal(cache: Path, owner: str) -> UserError:
    return UserError(
        f"{cache} is being written by another process ({owner}): wait for it to end, stop it, or "
        "give another --out"
    )


def _read_owner(descriptor: int) -> str:
    return os.read(descriptor, 4096).decode(errors="replace") or "not named yet"


def _is_slices_turn(path: Path) -> bool:
    try:
        return "slice" in json.loads(path.read_text())
    except (OSError, ValueError):  # released, or not named yet
        return False


def _owner_of(path: Path) -> str | None:
    """Who holds a lock; None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path` (its last owner may have unlinked it)."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
