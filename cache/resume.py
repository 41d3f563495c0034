"""What a cache on disk already holds, true to the settings and the plan of this run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from teacher_cache.cache.commit import explained
from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.fingerprint import file_sha256
from teacher_cache.cache.index import read_segment
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.cache.sidecar import SHARDS_PER_FOLDER, Sidecar, read_sidecar, sidecar_path

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
