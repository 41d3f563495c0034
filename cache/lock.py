"""One writer a cache: a lock that names its owner and that a crash releases."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from teacher_cache.cache.commit import explained, make_folder
from teacher_cache.cache.errors import UserError

LOCK_NAME = "writer.lock"


@contextmanager
def writer_lock(cache: Path) -> Iterator[None]:
    """Hold the cache's writer lock; the kernel releases it should the process die.

    Raises:
        UserError: when another process writes this cache, naming host and process.
    """
    make_folder(cache)
    path = cache / LOCK_NAME
    descriptor = _acquire(path)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
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
            owner = os.read(descriptor, 4096).decode(errors="replace") or "not named yet"
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is being written by another process ({owner}): wait for it to "
                "end, stop it, or give another --out"
            ) from error
        if _is_current(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path` (its last owner may have unlinked it)."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
