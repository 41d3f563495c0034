from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.training.run_folder import (
    MARKER_NAME,
    commit_checkpoint,
    is_committed,
    newest_checkpoint,
    remove_checkpoint,
    remove_old_checkpoints,
    require_committed,
    saved,
)


def write_checkpoint(folder: Path, step: int, *, committed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights of step %d" % step)
    (checkpoint / "optimizer.pt").write_bytes(b"moments of step %d" % step)
    if committed:
        commit_checkpoint(checkpoint)
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_marker_names_every_file_and_its_hash(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    recorded = json.loads((checkpoint / MARKER_NAME).read_text())
    assert sorted(recorded) == ["model.safetensors", "optimizer.pt"]
    assert all(len(sha256) == 64 for sha256 in recorded.values())
    assert is_committed(checkpoint)


def change(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"momentS of step 4")


def lose(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def lose_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER_NAME).unlink()


def tear_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER_NAME).write_text('{"model.safetensors": ')


@pytest.mark.parametrize("damage", [change, lose, lose_marker, tear_marker])
def test_a_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    older, newest = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    damage(newest)
    assert newest_checkpoint(tmp_path) == older
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped {newest}: it is not complete or was changed"
    ]
    with pytest.raises(UserError, match=r"checkpoint-4 is no complete checkpoint .*--resume auto"):
        require_committed(newest)
    assert require_committed(older) == older


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        require_committed(tmp_path / "missing")


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = {step: write_checkpoint(tmp_path, step) for step in (2, 4, 6, 8, 10)}
    remove_old_checkpoints(tmp_path, keep=checkpoints[4])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    remove_old_checkpoints(tmp_path, keep=None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-8"]


def test_old_ones_wait_for_a_new_committed_one(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    newest = write_checkpoint(tmp_path, 6, committed=False)
    remove_old_checkpoints(tmp_path, keep=None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    commit_checkpoint(newest)
    remove_old_checkpoints(tmp_path, keep=None)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_what_a_kill_left_of_a_removed_one_goes_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2, committed=False)  # its marker went first
    for step in (4, 6):
        write_checkpoint(tmp_path, step)
    remove_old_checkpoints(tmp_path, keep=None)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_the_marker_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    removed: list[str] = []
    unlink = os.unlink
    monkeypatch.setattr(
        os, "unlink", lambda path, **given: (removed.append(Path(path).name), unlink(path, **given))
    )
    remove_checkpoint(checkpoint)
    assert removed[0] == MARKER_NAME
    assert sorted(removed[1:]) == ["model.safetensors", "optimizer.pt"]
    assert not checkpoint.exists()
    remove_checkpoint(checkpoint)  # there is none: nothing to do


def refuse_in_python(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_in_torch(folder: Path) -> None:
    torch.save({}, folder / "no such folder" / "optimizer.pt")


def refuse_in_safetensors(folder: Path) -> None:
    safetensors.torch.save_file({}, folder / "no such folder" / "model.safetensors")


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (refuse_in_python, r"^cannot write \S+: the disk is full; free some space"),
        (refuse_in_torch, r"^cannot write \S+ \(.+\): if the disk is full, free some space"),
        (refuse_in_safetensors, r"^cannot write \S+ \(.+\): if the disk is full, free some space"),
    ],
)
def test_a_refused_write_is_one_sentence(
    tmp_path: Path, refuse: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused, saved(tmp_path):
        refuse(tmp_path)
    assert str(refused.value).endswith("the same command resumes from it)")
    assert "\n" not in str(refused.value)


def test_what_was_saved_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    with saved(tmp_path):
        (tmp_path / "part").mkdir()
        written = [tmp_path / "model.safetensors", tmp_path / "part" / "optimizer.pt"]
        for path in written:
            path.write_bytes(b"bytes")
    assert {path.stat().st_ino for path in (*written, tmp_path)} <= synced


def test_what_a_killed_save_left_is_gone(tmp_path: Path) -> None:
    """safetensors' own half-written file, and nothing that is only called like it."""
    kept = {".tmp", ".tmpKs4", ".tmp-Ks4Sn", "a.tmpKs4Sns"}
    for name in (".tmpKs4Sns", *kept):
        (tmp_path / name).write_bytes(b"half")
    with saved(tmp_path):
        safetensors.torch.save_file({"one": torch.ones(2)}, tmp_path / "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "model.safetensors"}
