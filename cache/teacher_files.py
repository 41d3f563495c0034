"""Files of a cache's `teacher` folder, read against their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest


def read_teacher_file(cache: Path, manifest: Manifest, name: str) -> bytes:
    """A file of the `teacher` folder that the manifest lists.

    Raises:
        CheckFailed: if it is damaged or missing.
    """
    path = cache / TEACHER_FOLDER / name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest.teacher_files[name]:
        raise CheckFailed(
            f"{path} is missing or differs from its SHA-256: run the same `pipe cache-teacher` "
            "again, it writes the file anew and computes no shard again"
        )
    return data
