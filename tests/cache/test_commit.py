from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.cache import commit
from teacher_cache.cache.errors import UserError
from tests.small_caches import without_token

REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space or choose another --out",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "permission was denied; choose an --out that you may write to",
    errno.EPERM: "permission was denied; choose an --out that you may write to",
}


def test_nothing_is_written_in_a_folders_or_a_devices_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((tmp_path, "a folder"), (pipe, "no regular file")):
        with pytest.raises(UserError, match=f"cannot write {path}: it is {kind}; give the path"):
            commit.write_bytes_atomically(path, b"data")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    commit.write_bytes_atomically(tmp_path / "link", b"old")
    (tmp_path / "other").symlink_to(tmp_path / "link")
    commit.write_bytes_atomically(tmp_path / "other", b"new")
    assert (tmp_path / "other").read_bytes() == b"new"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_replaces_a_file_whole_and_makes_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    commit.write_bytes_atomically(path, b"first, and longer")
    commit.write_bytes_atomically(path, b"second")
    assert _files(tmp_path) == {"file": b"second"}


def test_data_are_durable_before_the_name_and_the_name_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        synced = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_ino == inode]
        steps.append(f"fsync {without_token(synced[0].name)}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        steps.append(f"rename {without_token(source.name)} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    commit.write_bytes_atomically(tmp_path / "outer" / "inner" / "file", b"data")
    assert steps == [
        f"fsync {tmp_path.name}",  # has the new folder `outer`
        "fsync outer",  # has the new folder `inner`
        "fsync .file.tmp",
        "rename .file.tmp file",
        "fsync inner",
    ]


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_refusal_is_one_sentence_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = tmp_path / "file"
    commit.write_bytes_atomically(path, b"old")
    if step == "open":
        monkeypatch.setattr(commit, "open", _refusing(number), raising=False)
    elif step == "write":

        def open_full(name: Path, mode: str) -> _FullFile:
            name.touch()
            return _FullFile(number)

        monkeypatch.setattr(commit, "open", open_full, raising=False)
    else:
        monkeypatch.setattr(commit.os, step, _refusing(number))
    with pytest.raises(UserError) as caught:
        commit.write_bytes_atomically(path, b"new")
    message = str(caught.value)
    assert message.startswith(f"cannot write {path}: {REFUSALS[number]}")
    assert "same command resumes" in message and "\n" not in message
    assert _files(tmp_path) == {"file": b"old"}


class _FullFile:
    """A file that opens but takes no data."""

    def __init__(self, number: int):
        self.write = _refusing(number)

    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Path, "mkdir", _refusing(number))
    with pytest.raises(UserError, match=REFUSALS[number]):
        commit.make_folder(tmp_path / "new")


def test_a_temporary_file_that_cannot_be_removed_changes_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that goes read-only refuses both: the rename and the clearing up."""
    monkeypatch.setattr(commit.os, "replace", _refusing(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", _refusing(errno.EROFS))
    with pytest.raises(UserError, match="the file system is read-only"):
        commit.write_bytes_atomically(tmp_path / "file", b"new")


@pytest.mark.parametrize("inside", [".", "sub", "sub/sub"])
def test_a_file_in_a_folders_place(tmp_path: Path, inside: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="a file stands where a folder must be; choose another"):
        commit.write_bytes_atomically(tmp_path / "taken" / inside / "file", b"new")
    assert _files(tmp_path) == {"taken": b"a file"}


def test_other_errors_are_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit.os, "replace", _refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        commit.write_bytes_atomically(tmp_path / "file", b"new")
    assert _files(tmp_path) == {}


def test_an_interruption_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        commit.write_bytes_atomically(tmp_path / "file", b"new")
    assert _files(tmp_path) == {}


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "file", tmp_path / "sub" / "file.tmp", tmp_path / "sub" / ".hidden"]
    left = [tmp_path / ".file.tmp", tmp_path / "sub" / ".000000.arrow.tmp"]
    for path in (*kept, *left):
        commit.write_bytes_atomically(path, b"")
    assert commit.remove_leftovers(tmp_path) == left
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_json_is_readable_sorted_and_strict(tmp_path: Path) -> None:
    commit.write_json_atomically(tmp_path / "file", {"b": "é", "a": [1, 2]})
    text = (tmp_path / "file").read_text()
    assert json.loads(text) == {"a": [1, 2], "b": "é"}
    assert text.index('"a"') < text.index('"b"') and "é" in text and text.endswith("\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        commit.write_json_atomically(tmp_path / "file", float("nan"))
    assert (tmp_path / "file").read_text() == text


def test_canonical_json_does_not_depend_on_order_or_locale() -> None:
    assert commit.canonical_json({"b": 1, "a": {"d": "é", "c": None}}) == (
        '{"a":{"c":null,"d":"é"},"b":1}'
    )
