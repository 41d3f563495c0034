"""How large a cache will be, before the teacher runs, and whether the disk has room for it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Corpus
from teacher_cache.stages.data.views import Views
from teacher_cache.stages.teacher.task import Task

NUM_PROBED_FOR_SIZE = 64
SIDECAR_SUFFIX = ".json"

logger = logging.getLogger(__name__)


def estimated_bytes(task: Task, splits: Mapping[str, Corpus | Views]) -> float:
    """Of all shards, by the first documents of each split."""
    total = 0.0
    for documents in splits.values():
        first = documents.documents(0, min(NUM_PROBED_FOR_SIZE, len(documents)))
        of_one = task.bytes_per_document(first) if first else None
        total += (of_one or 0.0) * len(documents)
    return total


def free_bytes(cache: Path) -> int:
    """What is free on the disk of a cache, whose folder need not exist."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def require_room(cache: Path, num_bytes: float, *, num_shards: int, overwrite: bool) -> None:
    """Refuse a cache that will not fit, and say how large it will be.

    Args:
        cache: its folder, which need not exist.
        num_bytes: of all its shards.
        num_shards: of all its splits; those that are there already need no room.
        overwrite: whether those are removed instead.

    Raises:
        UserError: naming both sizes.
    """
    there = [path for path in cache.glob("*/*/*") if path.is_file()]
    done = 0 if overwrite else sum(path.suffix == SIDECAR_SUFFIX for path in there)
    missing = num_bytes * max(0.0, 1 - done / max(1, num_shards))
    free = free_bytes(cache) + sum(path.stat().st_size for path in there if overwrite)
    if missing > free:
        raise UserError(
            f"the cache will take about {_mb(missing)} MB and the disk of {cache} has "
            f"{_mb(free)} MB free: give an --out on a larger disk, or cache less (fewer "
            "documents, fewer --attention-layers, --attention mean or cls, a smaller --max-length)"
        )
    if missing:
        logger.info("about %s MB to write (%s MB are free)", _mb(missing), _mb(free))


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"
