"""Shards that went bad and disks that refuse: each an exit code and one sentence, nothing lost."""

from __future__ import annotations

import builtins
import errno
import filecmp
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.manifest import CHECKSUM, MANIFEST_NAME
from tests.command_line import TINY_STUDENT, done, refused
from tests.integration.conftest import Copy, cache_command, contents


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 10)


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit])
def test_a_damaged_shard_is_named_and_only_that_one_is_rebuilt(
    damage: Callable[[Path], None], own: Copy, bert_cache: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    cache = own(bert_cache)
    shard = cache / "labeled" / "000" / "000001.arrow"
    damage(shard)
    before = contents(cache)
    refused("train-student", "--cache", cache, *TINY_STUDENT, code=1, saying=re.escape(str(shard)))
    printed = refused("verify", cache, code=1, saying="has a problem: run the `pipe cache-teacher`")
    assert f"✗ {shard}" in printed

    printed = done(*cache_command(acl_imdb, tiny_bert, cache))
    assert "1 shards computed, 5 kept" in printed
    assert shard.read_bytes() == (bert_cache / "labeled" / "000" / "000001.arrow").read_bytes()
    after = contents(cache)
    shards = [path for path in after if path.suffix == ".arrow" and "index" not in path.parts]
    assert [path for path in shards if before.get(path) != after[path]] == [
        shard.relative_to(cache)
    ]
    done("verify", cache)


@contextmanager
def refusing(code: int, pattern: str, below: Path) -> Iterator[list[str]]:
    """Let the file system fail under every path below a folder that matches a pattern.

    Folders cannot be made, nor files opened for writing; where the disk is full, a file opens and
    takes a half of what is written. Yields the names of what was refused.
    """
    failed: list[str] = []
    mkdir, os_open, plain_open = os.mkdir, os.open, builtins.open
    error = OSError(code, os.strerror(code))

    def hits(path: Any) -> bool:
        if isinstance(path, int):
            return False
        text = os.path.abspath(os.fspath(path))
        found = text.startswith(str(below.absolute())) and bool(re.search(pattern, text))
        if found:
            failed.append(text)
        return found

    def no_mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if hits(path) and not os.path.isdir(path):
            raise error
        mkdir(path, *args, **kwargs)

    def no_os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and hits(path):
            raise error
        return os_open(path, flags, *args, **kwargs)

    def no_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+") or not hits(path):
            return plain_open(path, mode, *args, **kwargs)
        if code != errno.ENOSPC:
            raise error
        return _Full(plain_open(path, mode, *args, **kwargs), error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", no_mkdir)
        patch.setattr(os, "open", no_os_open)
        patch.setattr(builtins, "open", no_open)
        yield failed


class _Full:
    """A file on a disk that has room for a half of the next write."""

    def __init__(self, file: Any, error: OSError):
        self._file = file
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        raise self._error


REFUSALS = {
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "permission was denied; choose an --out that you may write to",
    errno.ENOSPC: "the disk is full; free some space",
}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written(
    code: int, bert_cache: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    with refusing(code, "", Path()):
        refused(*cache_command(acl_imdb, tiny_bert, Path("new")), saying=REFUSALS[code])
        command = ("train-student", "--cache", bert_cache, "--out", "run", *TINY_STUDENT)
        refused(*command, saying=REFUSALS[code])
    assert not list(Path().iterdir())


def test_a_cache_that_may_not_be_written_can_be_read(
    own: Copy, bert_cache: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    cache = own(bert_cache)
    before = contents(cache)
    with refusing(errno.EROFS, "", cache):
        refused(*cache_command(acl_imdb, tiny_bert, cache), saying=REFUSALS[errno.EROFS])
        done("inspect", cache)
        done("verify", cache)
        done("train-student", "--cache", cache, "--out", "run", *TINY_STUDENT)
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("full", "num_kept"),
    [
        ("tokenizer.json", 0),
        ("labeled/000/.000002.arrow", 2),
        ("index/.labeled-000000.arrow", 6),
    ],
)
def test_a_full_disk_in_stage_one_costs_nothing_that_was_finished(
    full: str, num_kept: int, bert_cache: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    command = cache_command(acl_imdb, tiny_bert, Path("cache"))
    with refusing(errno.ENOSPC, re.escape(full), Path("cache")) as failed:
        refused(*command, saying=REFUSALS[errno.ENOSPC])
    assert failed
    assert not [path for path in Path("cache").rglob("*.tmp")]
    printed = done(*command)
    assert f"{6 - num_kept} shards computed, {num_kept} kept" in printed
    assert _committed(Path("cache")) == _committed(bert_cache)


@pytest.mark.parametrize("full", ["checkpoint-6/trainer_state.json", "run/.tokenizer.json"])
def test_a_full_disk_in_stage_two_costs_nothing_that_was_finished(
    full: str, bert_cache: Path, bert_run: Path
) -> None:
    command = ("train-student", "--cache", bert_cache, "--out", "run", *TINY_STUDENT)
    with refusing(errno.ENOSPC, re.escape(full), Path("run")) as failed:
        refused(*command, saying="the disk is full; free some space")
    assert failed
    done(*command)
    assert filecmp.cmp("run/model.safetensors", bert_run / "model.safetensors", shallow=False)


def _committed(cache: Path) -> dict[Path, bytes]:
    """A cache's bytes, without the times in its manifest."""
    found = {path: data for path, (_, data) in contents(cache).items()}
    manifest = json.loads(found.pop(Path(MANIFEST_NAME)))
    del manifest["created_at"], manifest["completed_at"], manifest[CHECKSUM]
    return found | {Path(MANIFEST_NAME): json.dumps(manifest).encode()}
