"""Write a cache shard by shard; after a kill, the next writer goes on from what is committed.

The order of commits is shard, sidecar, index segment, manifest: done means all four. Several runs
may share the shards (`Share`); then the one that finds the last of them there finishes the cache.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from teacher_cache.cache.commit import explained, is_temporary_of, remove_leftovers
from teacher_cache.cache.committed import (
    find_committed,
    is_intact_beside_shards,
    missing_shards,
    refuse_fewer_documents,
)
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.fingerprint import hash_files, refuse_changed_settings
from teacher_cache.cache.lock import is_lock, live_slices, slice_lock, turn, writer_lock
from teacher_cache.cache.manifest import (
    MANIFEST_NAME,
    TEACHER_FOLDER,
    Manifest,
    NotACacheError,
    read_manifest,
)
from teacher_cache.cache.plan import Shard, ShardPlan, Share, is_split
from teacher_cache.cache.schema import Fields
from teacher_cache.cache.shards import Shards
from teacher_cache.cache.sidecar import SHARDS_PER_FOLDER, Sidecar, segment_path, write_segment

logger = logging.getLogger(__name__)


class CacheWriter:
    """The one writer of a cache, or of a slice of it; use as a context manager.

    Args:
        cache: folder of the cache, created if need be.
        manifest: what this run wants the cache to be (incomplete, without index).
        plans: the shard plan of each split, in the manifest's order.
        overwrite: start the cache again, whatever its settings were.
        needed_files: of the `teacher/` folder; a complete cache that an older release made
            without one of them gets it, and keeps its shards.
        share: of the shards, what this run makes; other runs may make the rest meanwhile.

    Attributes:
        manifest: as it stands.
        intact_files: once entered, those of the `teacher/` folder that an earlier run of the same
            settings recorded and that have not changed since: what is costly need not be made anew.

    Raises:
        UserError: on entering, if another process writes here, the folder is something else, the
            recorded settings or layout differ, or the cache already holds more documents.
    """

    def __init__(
        self,
        cache: Path,
        manifest: Manifest,
        plans: dict[str, ShardPlan],
        *,
        overwrite: bool,
        needed_files: Collection[str] = (),
        share: Share = Share(),  # noqa: B008  (frozen)
    ):
        if overwrite and not share.is_all:
            raise UserError(
                f"--overwrite would remove what other slices made, and this is slice {share}: "
                f"remove {cache} before the slices are started, or give another --out"
            )
        self.cache = cache
        self.manifest = replace(manifest, num_slices=share.num)
        self.intact_files: frozenset[str] = frozenset()
        self._plans = plans
        self._overwrite = overwrite
        self._needed_files = needed_files
        self._share = share
        self._sidecars: dict[Shard, Sidecar] = {}
        self._num_there: dict[tuple[str, int], int] = {}  # of each index segment
        self._segments: dict[str, str] = {}  # path -> sha256 of segments that are still true
        self._stack = ExitStack()
        self._beginning = ExitStack()  # what slices hold in turn, until `begin` is through

    def __enter__(self) -> CacheWriter:
        with ExitStack() as stack:
            self._beginning = stack.enter_context(ExitStack())
            if self._share.is_all:
                stack.enter_context(writer_lock(self.cache))
            else:
                self._beginning.enter_context(turn(self.cache, self._share))
            others = live_slices(self.cache)
            if not self._share.is_all:
                stack.enter_context(slice_lock(self.cache, self._share))
            recorded = None
            if not (self.cache / MANIFEST_NAME).exists():
                self._refuse_foreign_folder()
            elif self._overwrite:
                self._clear()
            else:
                recorded = read_manifest(self.cache)
            # Only now: in a folder that is no cache, nothing is ours to remove. And while others
            # write here, what looks left over may be theirs.
            for leftover in [] if others else remove_leftovers(self.cache):
                logger.info("removed %s, left by a run that was killed", leftover)
            if recorded is not None:
                self._adopt(recorded, others=bool(others))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def begin(self, write_teacher_files: Callable[[Path], None]) -> list[Shard]:
        """Record teacher files and manifest, and list what is still to do.

        Args:
            write_teacher_files: fills the `teacher/` folder, atomically and deterministically.

        Returns:
            Every shard of this run that is not committed, in order; when there is none and the
            cache is complete, it is left as it was.
        """
        todo = [shard for shard in self._share.of(self._plans) if shard not in self._sidecars]
        if not self.manifest.complete:
            # Before all else: from here on a kill leaves what the next run knows to be a cache.
            self._write_manifest()
            folder = self.cache / TEACHER_FOLDER
            write_teacher_files(folder)
            self.manifest = replace(self.manifest, teacher_files=hash_files(folder))
            self._write_manifest()
        self._beginning.close()
        return todo

    def commit(
        self,
        split: str,
        shard_idx: int,
        fields: Fields,
        *,
        num_truncated: int,
        environment: dict[str, Any],
    ) -> Sidecar:
        """Make one shard durable, and `add` it.

        Raises:
            UserError: if the fields do not fit the schema or the file system refuses.
        """
        sidecar = self.shards.commit(
            split, shard_idx, fields, num_truncated=num_truncated, environment=environment
        )
        self.add(sidecar)
        return sidecar

    def add(self, sidecar: Sidecar) -> None:
        """Take a shard that is durable into account; one that fills an index segment commits it.

        Slices see each other's shards only in the end, and leave all segments to the last of them.

        Raises:
            UserError: where the file system refuses.
        """
        segment_idx = self._keep(sidecar)
        if self._num_there[sidecar.split, segment_idx] == SHARDS_PER_FOLDER:
            self._commit_segment(sidecar.split, segment_idx)
            self._write_manifest()

    def finish(self, about: Callable[[], Mapping[str, Any]] = dict) -> Manifest:
        """Commit the remaining index segments and, last, the complete manifest.

        A slice that finds others missing leaves the cache as it is, not complete.

        Args:
            about: asked for facts that only all shards tell, once all are there.

        Raises:
            UserError: where the file system refuses.
            BadShardError: if what another run committed cannot be read back.
        """
        with self._turn():
            if not self._share.is_all:
                self.manifest = read_manifest(self.cache)
                if self.manifest.complete or not self._gather():
                    return self.manifest
            self._finish(about())
        return self.manifest

    @property
    def shards(self) -> Shards:
        """The cache's shards, for whoever makes or reads them."""
        return Shards(cache=self.cache, manifest=self.manifest, plans=self._plans)

    def committed(self) -> list[Sidecar]:
        """Every shard that is known to be durable, in order."""
        shards = Share().of(self._plans)
        return [self._sidecars[shard] for shard in shards if shard in self._sidecars]

    def _turn(self) -> AbstractContextManager[None]:
        return nullcontext() if self._share.is_all else turn(self.cache, self._share)

    def _gather(self) -> bool:
        """Learn what others committed; whether all shards are there."""
        missing, found = missing_shards(self.cache, self.manifest, self._plans, self._sidecars)
        for sidecar in found.values():
            self._keep(sidecar)
        return not missing

    def _finish(self, about: Mapping[str, Any]) -> None:
        is_whole = len(self._sidecars) == sum(map(len, self._plans.values()))
        assert is_whole, "finish() before every shard was committed"
        summaries = dict(self.manifest.splits)
        for split, plan in self._plans.items():
            sidecars = [self._sidecars[split, shard_idx] for shard_idx in range(len(plan))]
            for segment_idx in range(-(-len(plan) // SHARDS_PER_FOLDER)):
                if segment_path(split, segment_idx) not in self._segments:
                    self._commit_segment(split, segment_idx)
            summaries[split] = replace(
                summaries[split],
                num_samples=sum(sidecar.num_samples for sidecar in sidecars),
                num_tokens=sum(sidecar.num_tokens for sidecar in sidecars),
                num_truncated=sum(sidecar.num_truncated for sidecar in sidecars),
                num_bytes=sum(sidecar.num_bytes for sidecar in sidecars),
            )
        told = replace(self.manifest, about=self.manifest.about | dict(about))
        self.manifest = told.completed(summaries)
        self._write_manifest()

    def _keep(self, sidecar: Sidecar) -> int:
        """Remember a shard; the index segment that it is in."""
        shard = sidecar.split, sidecar.shard_idx
        segment = sidecar.split, sidecar.shard_idx // SHARDS_PER_FOLDER
        if shard not in self._sidecars:
            self._num_there[segment] = self._num_there.get(segment, 0) + 1
        self._sidecars[shard] = sidecar
        return segment[1]

    def _commit_segment(self, split: str, segment_idx: int) -> None:
        first = segment_idx * SHARDS_PER_FOLDER
        last = min(first + SHARDS_PER_FOLDER, len(self._plans[split]))
        members = [self._sidecars[split, shard_idx] for shard_idx in range(first, last)]
        entry = write_segment(self.cache, split, segment_idx, members)
        self._segments[entry["path"]] = entry["sha256"]

    def _write_manifest(self) -> None:
        index = tuple({"path": p, "sha256": s} for p, s in sorted(self._segments.items()))
        self.manifest = replace(self.manifest, index=index)
        self.manifest.write(self.cache)

    def _clear(self) -> None:
        """Remove the cache; its manifest goes last, since only that tells a cache from a folder."""
        try:
            read_manifest(self.cache)
        except NotACacheError:
            raise
        except (UserError, CheckFailed) as error:
            logger.warning("%s (starting it again)", error)
        with explained(self.cache):
            for folder in [path for path in self.cache.iterdir() if path.is_dir()]:
                if folder.name in ("index", TEACHER_FOLDER) or is_split(folder.name):
                    shutil.rmtree(folder)
            (self.cache / MANIFEST_NAME).unlink()

    def _refuse_foreign_folder(self) -> None:
        foreign = sorted(
            path.name
            for path in self.cache.iterdir()
            if not is_lock(path.name) and not is_temporary_of(MANIFEST_NAME, path.name)
        )
        if foreign:
            raise UserError(
                f"{self.cache} holds {foreign[0]!r} and no {MANIFEST_NAME}, so it is no cache: "
                "give an --out that is new or empty"
            )

    def _adopt(self, recorded: Manifest, *, others: bool) -> None:
        """Go on from the recorded state: check that it is the same cache, find what is done."""
        wanted = self.manifest
        shared = recorded.splits.keys() & wanted.splits.keys()
        refuse_changed_settings(
            self.cache,
            _compared(recorded, shared),
            _compared(wanted, shared),
            start_again="--overwrite",
        )
        refuse_fewer_documents(self.cache, recorded, self._plans)
        if others and recorded.plans != self._plans:
            raise UserError(
                f"{self.cache} is being written in slices of fewer documents than this run asks "
                "for: wait for them to end, then raise the limit"
            )
        committed = find_committed(self.cache, recorded, self._plans, self._share)
        for sidecar in committed.sidecars.values():
            self._keep(sidecar)
        self._segments = committed.segments
        found = hash_files(self.cache / TEACHER_FOLDER)
        intact = dict(found.items() & recorded.teacher_files.items())
        self.intact_files = frozenset(intact)
        is_whole = all(shard in self._sidecars for shard in self._share.of(self._plans))
        has_all = set(self._needed_files) <= recorded.teacher_files.keys()
        if (
            recorded.complete
            and recorded.plans == self._plans
            and is_whole
            and has_all
            and is_intact_beside_shards(self.cache, recorded)
        ):
            self.manifest = recorded
        else:
            # A kill before all teacher files are written anew must not forget those that need not.
            self.manifest = replace(wanted, created_at=recorded.created_at, teacher_files=intact)


def _compared(manifest: Manifest, splits: Collection[str]) -> dict[str, Any]:
    """What two runs that write to one cache must agree on, of the splits that both have."""
    return {
        "format": manifest.store,
        "settings": manifest.settings,
        "layout": manifest.layout,
        "splits": {split: manifest.splits[split].settings for split in splits},
    }
