"""A cache whose distributions are over a student's ids: whose they are, and who may read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import CheckFailed
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.stages.join.token_bytes import token_bytes
from teacher_cache.stages.join.vocabulary_map import MAP_FILE, VocabularyMap, read_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def require_own_table(cache: Path, manifest: Manifest, student: PreTrainedTokenizerBase) -> None:
    """Refuse a student whose ids are not those that an aligned cache is over.

    A cache of the teacher's own support passes: whether the student's ids are the teacher's, the
    join finds out. The positions of an aligned cache are still the teacher's tokens.

    Args:
        cache: its folder.
        manifest: its manifest.
        student: the student's tokenizer.

    Raises:
        CheckFailed: naming both tables' hashes, or for a map that is not the manifest's.
        UserError: if the map is missing, or the tokenizer is of no known kind.
    """
    found = recorded_map(cache, manifest)
    if found is not None:
        found.require_student(token_bytes(student))
