"""Which cache `train-student` takes when none is named."""

from __future__ import annotations

import logging
from pathlib import Path

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest

CACHES = Path("caches")

logger = logging.getLogger(__name__)


def newest_cache(folder: Path = CACHES) -> Path:
    """The complete cache with the newest manifest; names those that are not complete.

    Raises:
        UserError: if there is none, or one cannot be read: it might be the one that was meant.
    """
    complete = []
    for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        if manifest.complete:
            complete.append((manifest.completed_at, path.parent))
        else:
            logger.warning("passed over: %s is not complete", path.parent)
    if not complete:
        raise UserError(
            f"there is no complete cache in {folder}: run `pipe cache-teacher --data ...` first, "
            "or name one with --cache"
        )
    return max(complete)[1]
