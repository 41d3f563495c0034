"""What stage one asks of whoever makes its shards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from teacher_cache.cache.plan import Shard, Share
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.stages.cache_job import Outline
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.task import Findings


class Workers(Protocol):
    """Those who make the shards of one run, each with a teacher of its own.

    Whoever they are and however many, the bytes are those of one process.
    """

    @property
    def outline(self) -> Outline:
        """What the cache is to be, as one of them sees it."""
        ...

    @property
    def share(self) -> Share:
        """The part of the shards that this run makes; other runs make the others."""
        ...

    def write_teacher_files(self, folder: Path, intact: Collection[str]) -> None:
        """As `CacheJob.write_teacher_files`."""
        ...

    def make(self, todo: Sequence[Shard], on_batch: OnBatch) -> Iterator[Sidecar]:
        """Make shards durable, in any order.

        Args:
            todo: those that are not committed.
            on_batch: called with samples and tokens as they are done.

        Yields:
            Each shard's sidecar, once it is committed.

        Raises:
            UserError: for what a user can mend, or if a shard ended all that tried to make it.
        """
        ...

    def found(self, sidecars: Sequence[Sidecar]) -> Findings | None:
        """As `CacheJob.found`."""
        ...
