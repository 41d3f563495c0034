"""Check every byte of a cache against what was recorded when it was committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.cache.committed import what_is_missing
from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.fingerprint import file_sha256, fingerprint
from teacher_cache.cache.manifest import MANIFEST_NAME, TEACHER_FOLDER, Manifest, read_manifest
from teacher_cache.cache.sidecar import Sidecar, read_segment, read_sidecar


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked and what was wrong; `problems` is empty for a sound cache."""

    num_shards: int
    num_bytes: int
    problems: tuple[str, ...]


def verify(cache: Path, *, on_shard: Callable[[Sidecar], None] | None = None) -> VerifyReport:
    """Check manifest, index, sidecars, shards and teacher files by their hashes.

    Args:
        cache: the cache's folder.
        on_shard: called after each shard, for a progress bar.

    Raises:
        UserError: if there is no cache or its format is newer than this release.
    """
    manifest = read_manifest(cache)
    problems: list[str] = []
    if fingerprint(manifest.settings) != manifest.fingerprint:
        problems.append(f"{cache / MANIFEST_NAME}: the settings do not have the fingerprint")
    if not manifest.complete:
        problems.append(what_is_missing(cache, manifest))
    problems.extend(_teacher_problems(cache, manifest))
    sidecars = _indexed(cache, manifest, problems)
    if manifest.complete:
        problems.extend(_count_problems(manifest, sidecars))
    for sidecar in sidecars:
        try:
            if read_sidecar(cache, sidecar.split, sidecar.shard_idx) != sidecar:
                problems.append(f"{cache / sidecar.path}: sidecar is missing or not the index's")
            sidecar.verify(cache)
        except BadShardError as error:
            problems.append(str(error))
        if on_shard is not None:
            on_shard(sidecar)
    return VerifyReport(
        num_shards=len(sidecars),
        num_bytes=sum(sidecar.num_bytes for sidecar in sidecars),
        problems=tuple(problems),
    )


def _teacher_problems(cache: Path, manifest: Manifest) -> list[str]:
    return [
        f"{cache / TEACHER_FOLDER / name} is missing or differs from its SHA-256"
        for name, sha256 in manifest.teacher_files.items()
        if not (path := cache / TEACHER_FOLDER / name).is_file() or file_sha256(path) != sha256
    ]


def _indexed(cache: Path, manifest: Manifest, problems: list[str]) -> list[Sidecar]:
    """Sidecars of the indexed shards; of an incomplete cache, whatever has been committed."""
    sidecars: list[Sidecar] = []
    for entry in manifest.index:
        try:
            sidecars.extend(read_segment(cache, entry))
        except BadShardError as error:
            problems.append(str(error))
    if not manifest.complete:
        known = {(sidecar.split, sidecar.shard_idx) for sidecar in sidecars}
        for split, summary in manifest.splits.items():
            for shard_idx in range(summary.num_shards):
                if (split, shard_idx) in known:
                    continue
                try:
                    sidecar = read_sidecar(cache, split, shard_idx)
                except BadShardError as error:
                    problems.append(str(error))
                else:
                    sidecars.extend([sidecar] if sidecar is not None else [])
    return sidecars


def _count_problems(manifest: Manifest, sidecars: list[Sidecar]) -> list[str]:
    problems = []
    for split, summary in manifest.splits.items():
        found = sorted(sidecar.shard_idx for sidecar in sidecars if sidecar.split == split)
        if found != list(range(summary.num_shards)):
            problems.append(
                f"the index lists {len(found)} {split} shards, the manifest {summary.num_shards}"
            )
    return problems
