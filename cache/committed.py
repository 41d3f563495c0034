"""What of a cache is committed, so that it need not be done again; and what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from teacher_cache.cache.commit import explained
from teacher_cache.cache.errors import BadShardError, UserError
from teacher_cache.cache.fingerprint import file_sha256
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.cache.plan import Shard, ShardPlan, Share
from teacher_cache.cache.sidecar import (
    SHARDS_PER_FOLDER,
    Sidecar,
    read_segment,
    read_sidecar,
    sidecar_path,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What need not be done again.

    Attributes:
        sidecars: of the durable shards.
        segments: SHA-256 of each index segment that is full and true, by path.
    """

    sidecars: dict[Shard, Sidecar] = field(default_factory=dict)
    segments: dict[str, str] = field(default_factory=dict)


def refuse_fewer_documents(cache: Path, recorded: Manifest, plans: Mapping[str, ShardPlan]) -> None:
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


def find_committed(
    cache: Path, recorded: Manifest, plans: Mapping[str, ShardPlan], share: Share
) -> Committed:
    """The shards of a share that are durable and true to their plan.

    While a run is on, sidecars are the truth and indexed shards are not read again. Of a complete
    cache every shard is: there is nothing else to do there but to look for damage. A sidecar that
    is not true goes, so that one that is there always is: others wait for it.
    """
    indexed, segments = _read_segments(cache, recorded, plans)
    committed = Committed(segments={} if recorded.complete else segments)
    for shard in share.of(plans):
        if shard in indexed and not recorded.complete:
            committed.sidecars[shard] = indexed[shard]
            continue
        try:
            sidecar = _true_sidecar(cache, recorded, plans, shard, indexed.get(shard))
            if sidecar is not None:
                sidecar.verify(cache)
                committed.sidecars[shard] = sidecar
        except BadShardError as error:
            logger.warning("%s (rebuilding it now)", error)
        if shard not in committed.sidecars:
            path = sidecar_path(cache, *shard)
            with explained(path):
                path.unlink(missing_ok=True)
    return committed


def committed_sidecar(
    cache: Path, manifest: Manifest, plans: Mapping[str, ShardPlan], shard: Shard
) -> Sidecar | None:
    """The sidecar of a shard that is there and true to its plan; its bytes are not read.

    Raises:
        BadShardError: if it cannot be read back.
    """
    return _true_sidecar(cache, manifest, plans, shard, None)


def missing_shards(
    cache: Path, manifest: Manifest, plans: Mapping[str, ShardPlan], known: Iterable[Shard] = ()
) -> tuple[list[Shard], dict[Shard, Sidecar]]:
    """Shards that nobody has committed, and the sidecars of those that somebody has.

    Args:
        cache: its folder.
        manifest: as it stands.
        plans: of its splits.
        known: shards that are known to be there and are not looked for.

    Raises:
        BadShardError: if a sidecar cannot be read back.
    """
    indexed, _ = _read_segments(cache, manifest, plans)
    known = set(known)
    missing: list[Shard] = []
    found: dict[Shard, Sidecar] = {}
    for shard in Share().of(plans):
        if shard in known:
            continue
        sidecar = indexed.get(shard) or committed_sidecar(cache, manifest, plans, shard)
        if sidecar is None:
            missing.append(shard)
        else:
            found[shard] = sidecar
    return missing, found


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


def what_is_missing(cache: Path, manifest: Manifest) -> str:
    """Of a cache that is not complete, in a sentence: what to run, and which slices are missing."""
    again = f"{cache} is not complete: run the same `{manifest.maker}` again"
    if manifest.num_slices == 1:
        return f"{again}, it resumes from the committed shards"
    plans = manifest.plans
    shares = [Share(idx=idx, num=manifest.num_slices) for idx in range(manifest.num_slices)]
    missing = set(missing_shards(cache, manifest, plans)[0])
    slices = [str(share) for share in shares if missing.intersection(share.of(plans))]
    if not slices:
        return f"{again} with any --slice: every shard is there, and it finishes the cache"
    listed = ", ".join(slices)
    return (
        f"{again} with --slice {listed}: {'this slice is' if len(slices) == 1 else 'these are'} "
        f"missing, {len(missing):,} of {len(Share().of(plans)):,} shards (without --slice one run "
        "makes them all)"
    )


def _true_sidecar(
    cache: Path,
    recorded: Manifest,
    plans: Mapping[str, ShardPlan],
    shard: Shard,
    indexed: Sidecar | None,
) -> Sidecar | None:
    """The shard's sidecar, if it is true to the plan.

    Raises:
        BadShardError: if it cannot be read back, or is not the one that the index has.
    """
    split, shard_idx = shard
    sidecar = read_sidecar(cache, split, shard_idx)
    if sidecar is not None and indexed is not None and sidecar != indexed:
        path = sidecar_path(cache, split, shard_idx)
        raise BadShardError(f"{path} is not the sidecar that the index has")
    return sidecar if sidecar and _is_current(sidecar, plans[split], recorded) else None


def _read_segments(
    cache: Path, recorded: Manifest, plans: Mapping[str, ShardPlan]
) -> tuple[dict[Shard, Sidecar], dict[str, str]]:
    """Indexed shards that are true to the plan, and the segments that hold nothing else."""
    found: dict[Shard, Sidecar] = {}
    segments: dict[str, str] = {}
    for entry in recorded.index:
        split = Path(entry["path"]).stem.rpartition("-")[0]
        if split not in plans:
            continue
        try:
            sidecars = read_segment(cache, entry)
        except BadShardError as error:
            logger.warning("%s", error)
            continue
        current = [one for one in sidecars if _is_current(one, plans[split], recorded)]
        found |= {(split, sidecar.shard_idx): sidecar for sidecar in current}
        if len(current) == len(sidecars) == SHARDS_PER_FOLDER:
            segments[entry["path"]] = entry["sha256"]
    return found, segments


def _is_current(sidecar: Sidecar, plan: ShardPlan, recorded: Manifest) -> bool:
    same_documents = sidecar.documents == plan.documents(sidecar.shard_idx)
    return same_documents and sidecar.fingerprint == recorded.fingerprint
