"""A worker in a process of its own, on whichever machine: a job that is prepared when it is needed.

It is called from afar, so nothing of ours is raised through whatever calls it: an answer holds a
value or an error, and what was logged on the way, for the process that has the terminal.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from teacher_cache.cache.errors import TeacherCacheError, UserError
from teacher_cache.cache.plan import Shard
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.stages.cache_job import CacheJob, CacheTeacherConfig, Outline
from teacher_cache.stages.teacher.task import Findings

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[Value]):
    """What a call gave.

    Attributes:
        value: of the call; None after an error.
        error: of ours, which the caller raises.
        notes: level and text of what was logged.
    """

    value: Value | None = None
    error: TeacherCacheError | None = None
    notes: tuple[tuple[int, str], ...] = ()


class RemoteWorker:
    """One of several workers, each with a teacher of its own.

    A process that was started again in another's place has loaded nothing: each call sees to that.

    Args:
        config: of the run.
        folder: in which its relative paths are meant.
    """

    def __init__(self, config: CacheTeacherConfig, folder: str):
        self._config = config
        self._folder = folder
        self._job: CacheJob | None = None

    def is_there(self) -> bool:
        """Whether the process runs."""
        return True

    def outline(self) -> Answer[Outline]:
        """What the cache is to be."""
        return self._answered(lambda: self._prepared().outline)

    def write_teacher_files(self, folder: Path, intact: Collection[str]) -> Answer[None]:
        """As `CacheJob.write_teacher_files`."""
        return self._answered(lambda: self._prepared().write_teacher_files(folder, intact))

    def make(self, outline: Outline, shard: Shard) -> Answer[Sidecar]:
        """As `CacheJob.make`, of a cache that another worker described."""
        return self._answered(lambda: self._made(outline, shard))

    def found(self, sidecars: Sequence[Sidecar]) -> Answer[Findings | None]:
        """As `CacheJob.found`."""
        return self._answered(lambda: self._prepared().found(sidecars))

    def _made(self, outline: Outline, shard: Shard) -> Sidecar:
        job = self._prepared()
        job.require_same(outline)
        return job.make(shard, lambda num_samples, num_tokens: None)

    def _prepared(self) -> CacheJob:
        if self._job is None:
            self._enter_folder()
            self._job = CacheJob.prepared(self._config)
        return self._job

    def _enter_folder(self) -> None:
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise UserError(
                f"{socket.gethostname()} has no folder {self._folder}, in which the run was "
                f"started ({error.strerror}): start it in a folder that all machines share"
            ) from error

    def _answered(self, act: Callable[[], Value]) -> Answer[Value]:
        notes = _Notes()
        logger = logging.getLogger("teacher_cache")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(notes)
        try:
            return Answer(value=act(), notes=tuple(notes.found))
        except TeacherCacheError as error:
            return Answer(error=error, notes=tuple(notes.found))
        finally:
            logger.removeHandler(notes)


class _Notes(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.levelno, record.getMessage()))


def value_of(answer: Answer[Any], log: Callable[[int, str], None]) -> Any:
    """What a call gave; its notes are logged here.

    Raises:
        TeacherCacheError: what the call ended with.
    """
    for level, text in answer.notes:
        log(level, text)
    if answer.error is not None:
        raise answer.error
    return answer.value
