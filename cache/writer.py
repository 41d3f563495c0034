"""Write a cache shard by shard; after a kill, the next writer goes on from what is committed.

The order of commits is shard, sidecar, index segment, manifest: done means all four.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from teacher_cache.cache.commit import (
    explained,
    remove_leftovers,
    temporary_name,
    write_bytes_atomically,
)
from teacher_cache.cache.errors import BadShardError, CheckFailed, UserError
from teacher_cache.cache.fingerprint import file_sha256, hash_files, refuse_changed_settings
from teacher_cache.cache.lock import LOCK_NAME, writer_lock
from teacher_cache.cache.manifest import (
    MANIFEST_NAME,
    TEACHER_FOLDER,
    Manifest,
    NotACacheError,
    read_manifest,
)
from teacher_cache.cache.plan import ShardPlan, is_split
from teacher_cache.cache.schema import Fields, Ragged
from teacher_cache.cache.sidecar import (
    SHARDS_PER_FOLDER,
    Sidecar,
    read_segment,
    read_sidecar,
    segment_path,
    shard_path,
    sidecar_path,
    write_segment,
)
from teacher_cache.cache.stores.named import store_named

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What need not be done again.

    Attributes:
        sidecars: of the durable shards of each split, by shard index.
        segments: SHA-256 of each index segment that is full and true, by path.
    """

    sidecars: dict[str, dict[int, Sidecar]]
    segments: dict[str, str] = field(default_factory=dict)


def refuse_fewer_documents(cache: Path, recorded: Manifest, plans: dict[str, ShardPlan]) -> None:
    """A cache grows, it never shrinks.

    Raises:
        UserError: if a recorded split has more documents than this run's plan.
    """
    for split, summary in recorded.splits.items():
        asked = plans[split].num_documents if split in plans else 0
        if asked < summary.num_documents:
            raise UserError(
                f"{cache} was started for {summary.num_documents:,} {split} documents, this run "
                f"asks for {asked:,}: raise the limit (or --views) to at least that, give another "
                "--out for the smaller cache, or --overwrite"
            )


def find_committed(cache: Path, recorded: Manifest, plans: dict[str, ShardPlan]) -> Committed:
    """The shards that are durable and true to their plan.

    While a run is on, sidecars are the truth and indexed shards are not read again. Of a complete
    cache every shard is: there is nothing else to do there but to look for damage.
    """
    committed = Committed(sidecars={split: {} for split in plans})
    for split, plan in plans.items():
        indexed, segments = _read_segments(cache, recorded, split, plan)
        if not recorded.complete:
            committed.sidecars[split].update(indexed)
            committed.segments.update(segments)
        for shard_idx in range(len(plan)):
            if shard_idx in committed.sidecars[split]:
                continue
            try:
                sidecar = _read_sidecar(cache, split, shard_idx, indexed.get(shard_idx))
                if sidecar is None or not _is_current(sidecar, plan, recorded):
                    continue
                sidecar.verify(cache)
            except BadShardError as error:
                logger.warning("%s (rebuilding it now)", error)
            else:
                committed.sidecars[split][shard_idx] = sidecar
    return committed


def is_intact_beside_shards(cache: Path, recorded: Manifest) -> bool:
    """Whether index and teacher files still have the hashes that the manifest recorded."""
    wanted = {entry["path"]: entry["sha256"] for entry in recorded.index}
    wanted |= {f"{TEACHER_FOLDER}/{name}": sha for name, sha in recorded.teacher_files.items()}
    for name, sha256 in wanted.items():
        path = cache / name
        if not path.is_file() or file_sha256(path) != sha256:
            logger.warning("%s is missing or differs from its SHA-256: writing it anew", path)
            return False
    return True


def _read_sidecar(
    cache: Path, split: str, shard_idx: int, indexed: Sidecar | None
) -> Sidecar | None:
    """The shard's sidecar; one that the index contradicts is deleted.

    Raises:
        BadShardError: if it cannot be read back, or is not the one that the index has.
    """
    sidecar = read_sidecar(cache, split, shard_idx)
    if sidecar is not None and indexed is not None and sidecar != indexed:
        # The run that rebuilds it may be killed, and the next one must not believe it.
        path = sidecar_path(cache, split, shard_idx)
        with explained(path):
            path.unlink()
        raise BadShardError(f"{path} is not the sidecar that the index has")
    return sidecar


def _read_segments(
    cache: Path, recorded: Manifest, split: str, plan: ShardPlan
) -> tuple[dict[int, Sidecar], dict[str, str]]:
    """Indexed shards that are true to the plan, and the segments that hold nothing else."""
    found: dict[int, Sidecar] = {}
    segments: dict[str, str] = {}
    for entry in recorded.index:
        if not entry["path"].startswith(f"index/{split}-"):
            continue
        try:
            sidecars = read_segment(cache, entry)
        except BadShardError as error:
            logger.warning("%s", error)
            continue
        current = [one for one in sidecars if _is_current(one, plan, recorded)]
        found |= {sidecar.shard_idx: sidecar for sidecar in current}
        if len(current) == len(sidecars) == SHARDS_PER_FOLDER:
            segments[entry["path"]] = entry["sha256"]
    return found, segments


def _is_current(sidecar: Sidecar, plan: ShardPlan, recorded: Manifest) -> bool:
    same_documents = sidecar.documents == plan.documents(sidecar.shard_idx)
    return same_documents and sidecar.fingerprint == recorded.fingerprint


class CacheWriter:
    """The one writer of a cache; use as a context manager.

    Args:
        cache: folder of the cache, created if need be.
        manifest: what this run wants the cache to be (incomplete, without index).
        plans: the shard plan of each split, in the manifest's order.
        overwrite: start the cache again, whatever its settings were.
        needed_files: of the `teacher/` folder; a complete cache that an older release made
            without one of them gets it, and keeps its shards.

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
    ):
        self.cache = cache
        self.manifest = manifest
        self.intact_files: frozenset[str] = frozenset()
        self._store = store_named(manifest.store)
        self._plans = plans
        self._overwrite = overwrite
        self._needed_files = needed_files
        self._sidecars: dict[str, dict[int, Sidecar]] = {split: {} for split in plans}
        self._segments: dict[str, str] = {}  # path -> sha256 of segments that are still true
        self._stack = ExitStack()

    def __enter__(self) -> CacheWriter:
        with ExitStack() as stack:
            stack.enter_context(writer_lock(self.cache))
            recorded = None
            if not (self.cache / MANIFEST_NAME).exists():
                self._refuse_foreign_folder()
            elif self._overwrite:
                self._clear()
            else:
                recorded = read_manifest(self.cache)
            # Only now: in a folder that is no cache, nothing is ours to remove.
            for leftover in remove_leftovers(self.cache):
                logger.info("removed %s, left by a run that was killed", leftover)
            if recorded is not None:
                self._adopt(recorded)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def begin(self, write_teacher_files: Callable[[Path], None]) -> list[tuple[str, int]]:
        """Record teacher files and manifest, and list what is still to do.

        Args:
            write_teacher_files: fills the `teacher/` folder, atomically and deterministically.

        Returns:
            (split, shard index) of every shard that is not committed, in order; when there is
            none the cache is left as it was.
        """
        todo = [
            (split, shard_idx)
            for split, plan in self._plans.items()
            for shard_idx in range(len(plan))
            if shard_idx not in self._sidecars[split]
        ]
        if not self.manifest.complete:
            # Before all else: from here on a kill leaves what the next run knows to be a cache.
            self._write_manifest()
            folder = self.cache / TEACHER_FOLDER
            write_teacher_files(folder)
            self.manifest = replace(self.manifest, teacher_files=hash_files(folder))
            self._write_manifest()
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
        """Make one shard durable, then its sidecar, then, where it fills one, its index segment.

        Raises:
            UserError: if the fields do not fit the schema or the file system refuses.
        """
        path = shard_path(split, shard_idx, self._store.suffix)
        stored = self._store.write(self.cache / path, self.manifest.schema, fields)
        ids, tokens = fields["sample_id"], fields["input_ids"]
        assert isinstance(ids, np.ndarray) and isinstance(tokens, Ragged)
        sidecar = Sidecar(
            split=split,
            shard_idx=shard_idx,
            path=path,
            documents=self._plans[split].documents(shard_idx),
            num_bytes=stored.num_bytes,
            num_samples=len(ids),
            num_tokens=len(tokens.values),
            num_truncated=num_truncated,
            first_id=ids[0].tobytes().hex() if len(ids) else "",
            last_id=ids[-1].tobytes().hex() if len(ids) else "",
            sha256=stored.sha256,
            batches=stored.batches,
            files=stored.files,
            fingerprint=self.manifest.fingerprint,
            environment=environment,
        )
        write_bytes_atomically(
            sidecar_path(self.cache, split, shard_idx), sidecar.to_json().encode()
        )
        self._sidecars[split][shard_idx] = sidecar
        segment_idx = shard_idx // SHARDS_PER_FOLDER
        members = self._segment_members(split, segment_idx)
        if len(members) == SHARDS_PER_FOLDER:
            self._commit_segment(split, segment_idx, members)
            self._write_manifest()
        return sidecar

    def batches(self, split: str) -> Iterator[Fields]:
        """The samples of the shards that are committed, in order, some at a time.

        Raises:
            BadShardError: if the bytes of one are missing or differ from their checksum.
        """
        for _, one in sorted(self._sidecars[split].items()):
            path, num = self.cache / one.path, one.num_samples
            shard = self._store.open(path, self.manifest.schema, one.stored, num_samples=num)
            yield from shard.batches()

    def finish(self, about: Mapping[str, Any] | None = None) -> Manifest:
        """Commit the remaining index segments and, last, the complete manifest.

        Args:
            about: facts that only all shards tell.

        Raises:
            UserError: where the file system refuses.
        """
        summaries = dict(self.manifest.splits)
        for split, plan in self._plans.items():
            sidecars = self._sidecars[split]
            assert len(sidecars) == len(plan), "finish() before every shard was committed"
            for segment_idx in range(-(-len(plan) // SHARDS_PER_FOLDER)):
                if segment_path(split, segment_idx) not in self._segments:
                    members = self._segment_members(split, segment_idx)
                    self._commit_segment(split, segment_idx, members)
            summaries[split] = replace(
                summaries[split],
                num_samples=sum(sidecar.num_samples for sidecar in sidecars.values()),
                num_tokens=sum(sidecar.num_tokens for sidecar in sidecars.values()),
                num_truncated=sum(sidecar.num_truncated for sidecar in sidecars.values()),
                num_bytes=sum(sidecar.num_bytes for sidecar in sidecars.values()),
            )
        told = replace(self.manifest, about=self.manifest.about | dict(about or {}))
        self.manifest = told.completed(summaries)
        self._write_manifest()
        return self.manifest

    def committed(self) -> list[Sidecar]:
        """Every shard that is durable, in order."""
        return [
            sidecars[shard_idx]
            for sidecars in self._sidecars.values()
            for shard_idx in sorted(sidecars)
        ]

    def _segment_members(self, split: str, segment_idx: int) -> list[Sidecar]:
        first = segment_idx * SHARDS_PER_FOLDER
        members = range(first, min(first + SHARDS_PER_FOLDER, len(self._plans[split])))
        found = self._sidecars[split]
        return [found[shard_idx] for shard_idx in members if shard_idx in found]

    def _commit_segment(self, split: str, segment_idx: int, members: list[Sidecar]) -> None:
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
        known = {LOCK_NAME, temporary_name(MANIFEST_NAME)}
        foreign = sorted(path.name for path in self.cache.iterdir() if path.name not in known)
        if foreign:
            raise UserError(
                f"{self.cache} holds {foreign[0]!r} and no {MANIFEST_NAME}, so it is no cache: "
                "give an --out that is new or empty"
            )

    def _adopt(self, recorded: Manifest) -> None:
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
        committed = find_committed(self.cache, recorded, self._plans)
        self._sidecars, self._segments = committed.sidecars, committed.segments
        found = hash_files(self.cache / TEACHER_FOLDER)
        intact = dict(found.items() & recorded.teacher_files.items())
        self.intact_files = frozenset(intact)
        whole = all(len(self._sidecars[split]) == len(plan) for split, plan in self._plans.items())
        has_all = set(self._needed_files) <= recorded.teacher_files.keys()
        if (
            recorded.complete
            and whole
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
