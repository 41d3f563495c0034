"""A cache whose distributions are over a student's ids: by which map.

Its positions are still the teacher's tokens. It serves the student of that table alone, which
`VocabularyMap.require_student` sees to.
"""

from __future__ import annotations

from pathlib import Path

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.stages.join.vocabulary_map import MAP_FILE, VocabularyMap, read_map

ALIGNED = "aligned"
"""`kind` of the support that a manifest records of a cache made with --align truncate or map."""


def recorded_map(cache: Path, manifest: Manifest) -> VocabularyMap | None:
    """The map that a cache was aligned by; None where its support is the teacher's own.

    Raises:
        UserError: if the file is missing.
        CheckFailed: if it is not the one of the manifest.
    """
    recorded = manifest.settings["support"]
    if recorded["kind"] != ALIGNED:
        return None
    found = read_map(cache / TEACHER_FOLDER)
    if found.support != recorded["aligned"]:
        raise CheckFailed(
            f"{cache / TEACHER_FOLDER / MAP_FILE} is not the map that {cache} was aligned by: run "
            "the same `pipe cache-teacher` again, it writes the file anew"
        )
    return found
