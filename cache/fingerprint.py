"""The settings that decide the cached values, their hash, and what to say when they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teacher_cache.cache.commit import canonical_json
from teacher_cache.cache.errors import UserError


def fingerprint(settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of the settings' canonical JSON."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}


def differences(
    recorded: dict[str, Any], requested: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Every leaf that differs, as (dotted field, recorded value, requested value)."""
    for key in sorted(recorded.keys() | requested.keys()):
        old, new = recorded.get(key), requested.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for field, old_leaf, new_leaf in differences(old, new):
                yield f"{key}.{field}", old_leaf, new_leaf
        elif old != new:
            yield key, old, new


def refuse_changed_settings(
    folder: Path, recorded: dict[str, Any], requested: dict[str, Any], *, start_again: str
) -> None:
    """Stop when a cache or a run was made with other settings; nothing is ever mixed.

    Args:
        folder: of the cache or the run.
        recorded: its settings.
        requested: this run's settings.
        start_again: the option that starts it again.

    Raises:
        UserError: naming every field that differs, both values and the remedy.
    """
    changed = [
        f"{field} is {old!r} there and {new!r} in this command"
        for field, old, new in differences(recorded, requested)
    ]
    if changed:
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(changed)}. Give the recorded "
            f"values, another --out, or {start_again} to start again"
        )
