from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_cache.cache import lock
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.lock import LOCK_NAME, writer_lock

HOLD = """
import pathlib, sys
from teacher_cache.cache.lock import writer_lock
with writer_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(cache: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_makes_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    with writer_lock(cache):
        assert json.loads((cache / LOCK_NAME).read_text()) == {
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
    assert list(cache.iterdir()) == []


def test_a_second_writer_is_refused_and_a_killed_one_releases(tmp_path: Path) -> None:
    with _holder(tmp_path) as owner:
        with pytest.raises(UserError) as caught, writer_lock(tmp_path):
            pass
        message = str(caught.value)
        assert f'"pid": {owner.pid}' in message and socket.gethostname() in message
        assert "wait for it to end, stop it, or give another --out" in message
        assert (tmp_path / LOCK_NAME).exists(), "the refused writer must leave the owner's lock"
        owner.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_NAME).exists()
    with writer_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_an_error_inside_releases(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writer_lock(tmp_path):
        raise KeyError
    with writer_lock(tmp_path):
        pass


def test_a_lock_that_its_owner_unlinked_in_between_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before the owner unlinked it, locked after: that file locks nothing any more."""
    path = tmp_path / LOCK_NAME
    path.write_text("the last owner's")
    flock, stale = fcntl.flock, path.stat().st_ino
    locked: list[int] = []

    def flock_after_the_owner_ended(descriptor: int, operation: int) -> None:
        if not locked:
            path.rename(tmp_path / "unlinked")  # keeps the inode from being used again
            path.touch()  # and another process already has a new one
        flock(descriptor, operation)
        locked.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(lock.fcntl, "flock", flock_after_the_owner_ended)
    with writer_lock(tmp_path):
        assert locked == [stale, path.stat().st_ino]
        assert stale != path.stat().st_ino


def test_a_lock_that_was_unlinked_for_good_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LOCK_NAME
    flock, calls = fcntl.flock, []

    def flock_after_unlink(descriptor: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock_after_unlink)
    with writer_lock(tmp_path):
        assert path.exists()
    assert len(calls) == 2


@pytest.mark.parametrize("call", ["open", "ftruncate", "write"])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lock.os, call, refuse)
    with pytest.raises(UserError, match="the file system is read-only"), writer_lock(tmp_path):
        pass


def test_a_disk_gone_read_only_does_not_hide_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(UserError, match="first"), writer_lock(tmp_path):
        monkeypatch.setattr(Path, "unlink", refuse)
        raise UserError("first")
    with writer_lock(tmp_path):  # the file that stayed locks nothing
        pass
