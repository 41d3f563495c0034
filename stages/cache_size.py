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
    """What the disk has for a cache: what is free, and what the cache takes there already."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    taken = sum(path.stat().st_size for path in cache.glob("*/*/*") if path.is_file())
    return shutil.disk_usage(there).free + taken


def require_room(cache: Path, num_bytes: float) -> None:
    """Refuse a cache that will not fit, and say how large it will be.

    Args:
        cache: its folder, which need not exist.
        num_bytes: of all its shards.

    Raises:
        UserError: naming both sizes.
    """
    free = free_bytes(cache)
    if num_bytes > free:
        raise UserError(
            f"the cache will take about {num_bytes / 1e6:,.1f} MB and the disk of {cache} has "
            f"{free / 1e6:,.1f} MB for it: give an --out on a larger disk, or cache less (fewer "
            "documents, fewer --attention-layers, --attention mean or cls, a smaller --max-length)"
        )
    logger.info("about %s MB in shards (%s MB are free)", _mb(num_bytes), _mb(free))


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"
