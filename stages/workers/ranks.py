"""Processes that torchrun started, each with a teacher on a device of its own.

The main one begins the cache, makes its share like all others, sees theirs by their sidecars, and
finishes. So nothing but the list of what is to do goes between them, and a process that dies is
torchrun's to report: what it had committed stays, what it had not the next run makes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import Shard, Share
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.stages.cache_job import CacheJob, CacheTeacherConfig, Outline
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.models.device import resolve_device
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.processes import (
    local_rank,
    num_local_processes,
    num_processes,
    outcome_of_main,
    process_group,
    rank,
)
from teacher_cache.stages.teacher.task import Findings

POLL_S = 0.1
CPU = torch.device("cpu")  # what they exchange is on no GPU


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All processes, as the main one sees them; `Workers`.

    Attributes:
        job: of the main process.
        share: all shards.
    """

    job: CacheJob
    share: Share = Share()  # noqa: RUF009  (frozen)

    @property
    def outline(self) -> Outline:
        """Of the main process."""
        return self.job.outline

    def write_teacher_files(self, folder: Path, intact: Collection[str]) -> None:
        """By the main process."""
        self.job.write_teacher_files(folder, intact)

    def make(self, todo: Sequence[Shard], on_batch: OnBatch) -> Iterator[Sidecar]:
        """This process's own, and in between what has arrived of the others."""
        outcome_of_main(lambda: (self.outline, list(todo)))
        shares = [deque(_mine(self.outline, todo, number)) for number in range(1, num_processes())]
        for shard in _mine(self.outline, todo, 0):
            yield self.job.make(shard, on_batch)
            yield from self._arrived(shares, on_batch)
        while any(shares):
            time.sleep(POLL_S)
            yield from self._arrived(shares, on_batch)

    def found(self, sidecars: Sequence[Sidecar]) -> Findings | None:
        """By the main process."""
        return self.job.found(sidecars)

    def _arrived(self, shares: Sequence[deque[Shard]], on_batch: OnBatch) -> Iterator[Sidecar]:
        """What other processes have committed; each makes its shards in order."""
        for share in shares:
            while share and (sidecar := self.outline.shards.committed(share[0])) is not None:
                share.popleft()
                on_batch(sidecar.num_samples, sidecar.num_tokens)
                yield sidecar


@contextmanager
def main_of_ranks(config: CacheTeacherConfig) -> Iterator[Ranks]:
    """What the main process does."""
    with _together(config.forward):
        yield Ranks(job=CacheJob.prepared(config))


def help_main(config: CacheTeacherConfig) -> tuple[Outline, int]:
    """What every other process does: make its share of what the main one found to be missing.

    Returns:
        The cache, and how many shards this process made.

    Raises:
        UserError: if this process would make other bytes than the main one, and as `make`.
    """
    with _together(config.forward):
        job = CacheJob.prepared(config)
        outline, todo = outcome_of_main(_nothing)
        job.require_same(outline)
        mine = _mine(outline, todo, rank())
        for shard in mine:
            job.make(shard, lambda num_samples, num_tokens: None)
        return outline, len(mine)


def _nothing() -> tuple[Outline, list[Shard]]:
    raise AssertionError("only the main process is asked")


def _mine(outline: Outline, todo: Sequence[Shard], number: int) -> list[Shard]:
    missing = set(todo)
    share = Share(idx=number, num=num_processes())
    return [shard for shard in share.of(outline.plans) if shard in missing]


@contextmanager
def _together(config: DeviceConfig) -> Iterator[None]:
    if resolve_device(config).type == "cuda":
        num_local, num_devices = num_local_processes(), torch.cuda.device_count()
        if num_local > num_devices:
            raise UserError(
                f"torchrun started {num_local} processes on a machine with {num_devices} CUDA "
                f"devices, and each teacher has one of its own: give --nproc-per-node {num_devices}"
            )
        torch.cuda.set_device(local_rank())
    with process_group(CPU):
        yield
