"""This process makes all shards, or one slice of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.cache.plan import Shard, Share
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.stages.cache_job import CacheJob, Outline
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.task import Findings


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One worker; `Workers`.

    Attributes:
        job: its own.
        share: of the shards, what it makes.
    """

    job: CacheJob
    share: Share

    @property
    def outline(self) -> Outline:
        """Of its job."""
        return self.job.outline

    def write_teacher_files(self, folder: Path, intact: Collection[str]) -> None:
        """By its job."""
        self.job.write_teacher_files(folder, intact)

    def make(self, todo: Sequence[Shard], on_batch: OnBatch) -> Iterator[Sidecar]:
        """One after the other."""
        for shard in todo:
            yield self.job.make(shard, on_batch)

    def found(self, sidecars: Sequence[Sidecar]) -> Findings | None:
        """By its job."""
        return self.job.found(sidecars)
