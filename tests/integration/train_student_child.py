"""What a forked child does: train a student, with a place to die at and a log of its steps."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, modeling_utils
from transformers.utils import logging

from teacher_cache.stages import train_student as stage_two
from teacher_cache.stages.training.config import TrainStudentConfig
from tests.small_caches import without_token
from tests.tiny_runs import read_tokenizers_once

BEFORE, HALF_WRITTEN, AFTER = "before", "half-written", "after"


class Steps:
    """Writes down every step that a training makes in its folder, and dies at one.

    A step is named `<phase> <what> <file>`, where every checkpoint's folder is `checkpoint`.

    Args:
        run: the training's folder.
        log: file that takes a line a step.
        die_at: the step at whose first occurrence the process kills itself.
    """

    def __init__(self, run: Path, log: Path, die_at: str | None):
        self._run = run
        self._log = log
        self._die_at = die_at

    def install(self) -> None:
        """Step between the process and whatever writes, renames or removes."""
        torch.save = self._writes(torch.save, path_at=1)
        save_file = modeling_utils.safe_save_file  # pyright: ignore[reportPrivateImportUsage]  (its)
        modeling_utils.safe_save_file = self._writes(save_file, path_at=1)  # pyright: ignore[reportPrivateImportUsage]
        TrainerState.save_to_json = self._writes(TrainerState.save_to_json, path_at=1)
        os.replace = self._around(os.replace, "rename", path_at=1)
        os.unlink = self._around(os.unlink, "remove", path_at=0)
        os.rmdir = self._around(os.rmdir, "remove", path_at=0)
        os.fsync = lambda _: None  # a kill loses nothing that was written, only a power cut would

    def _writes(self, write: Callable[..., Any], *, path_at: int) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            path = Path(args[path_at])
            if self._is_next(HALF_WRITTEN, "write", path):
                os.truncate(path, path.stat().st_size // 2)
            self._step(HALF_WRITTEN, "write", path)
            return result

        return stepped

    def _around(self, act: Callable[..., Any], what: str, *, path_at: int) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            # A folder is removed file by file, in no order, named without the folder.
            path = args[path_at] if kwargs.get("dir_fd") is None else "checkpoint/any"
            self._step(BEFORE, what, path)
            act(*args, **kwargs)
            self._step(AFTER, what, path)

        return stepped

    def _name(self, phase: str, what: str, path: str | Path) -> str:
        place = without_token(str(path)).removeprefix(f"{self._run}/").removeprefix("checkpoints/")
        return f"{phase} {what} {re.sub('checkpoint-[0-9]+', 'checkpoint', place)}"

    def _is_next(self, phase: str, what: str, path: str | Path) -> bool:
        return self._name(phase, what, path) == self._die_at

    def _step(self, phase: str, what: str, path: str | Path) -> None:
        name = self._name(phase, what, path)
        with open(self._log, "a") as log:
            log.write(f"{name}\n")
        if name == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def warm_up(config: str) -> None:
    """Train once, so that children find everything imported; and join once for all."""
    logging.disable_progress_bar()
    read_tokenizers_once(partial(setattr, stage_two))
    train_student(config)


def train_student(config: str, log: str | None = None, die_at: str | None = None) -> None:
    """Stage two, from a configuration in JSON with `out` given."""
    resolved = TrainStudentConfig.model_validate_json(config)
    assert resolved.training.out is not None
    if log is not None:
        Steps(resolved.training.out, Path(log), die_at).install()
    stage_two.run(resolved)
