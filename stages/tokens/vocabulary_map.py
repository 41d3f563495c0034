"""Which student id writes exactly the bytes of a teacher id (docs/maths.md, section 5, `map`).

Made from the two tables of token bytes alone, so it needs no model; kept in the cache's `teacher`
folder. A cache whose teacher was mapped at capture names the map in its support and serves that
student's table only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache.commit import canonical_json, write_bytes_atomically
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.stages.tokens.token_bytes import TokenBytes

MAP_FILE = "vocabulary_map.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyMap:
    """Teacher id to student id.

    Attributes:
        student_ids: int64 [V_t], the student's id for each of the teacher's, -1 where it has none.
        num_student_ids: ids of the student's table.
        teacher_sha256: of the teacher's `TokenBytes`.
        student_sha256: of the student's.
    """

    student_ids: np.ndarray
    num_student_ids: int
    teacher_sha256: str
    student_sha256: str

    def __post_init__(self) -> None:
        ids = self.student_ids
        if ids.ndim != 1 or ids.dtype != np.int64:
            raise ValueError(f"student ids of shape {ids.shape} and dtype {ids.dtype}")
        if ids.size and not (ids.min() >= -1 and ids.max() < self.num_student_ids):
            raise ValueError(f"student ids outside -1..{self.num_student_ids - 1}")

    @property
    def num_mapped(self) -> int:
        """Teacher ids that have a student id."""
        return int((self.student_ids >= 0).sum())

    @cached_property
    def sha256(self) -> str:
        """Of both tables and the ids."""
        head = f"{self.teacher_sha256} {self.student_sha256} {self.num_student_ids} "
        return hashlib.sha256(head.encode() + self.student_ids.astype("<i8").tobytes()).hexdigest()

    @property
    def support(self) -> str:
        """What a shard records whose teacher was mapped at capture."""
        return f"aligned:{self.sha256}"

    def require_student(self, student: TokenBytes) -> None:
        """Refuse a student whose ids mean something else than those this maps to.

        Raises:
            CheckFailed: naming both tables' hashes.
        """
        if self.student_sha256 not in (student.sha256, student.former_sha256):
            raise CheckFailed(
                f"the cache was mapped to the table {self.student_sha256[:12]} and serves no other "
                f"student, but this one's is {student.sha256[:12]}: use the tokenizer that was "
                "given to cache-teacher, or cache again without --align, which serves any"
            )


def exact_map(
    teacher: TokenBytes, student: TokenBytes, *, ends: tuple[Any, Any] = (None, None)
) -> VocabularyMap:
    """Map every teacher id to the student id of the same bytes and kind.

    Where several student ids write the same bytes, it is the one that the student's tokenizer
    writes. Several teacher ids may map to one student id. What stands for unknown text maps to
    nothing, and nothing to it. An added token finds the added token of its name, though one of the
    two be special.

    Args:
        teacher: its table.
        student: its table.
        ends: `eos_token_id` of both tokenizers. The two ends of text are one outcome, whatever
            they are called and whatever else the student calls what the teacher's is: it is the
            one that stands behind the student's documents, and that its labels name.
    """
    named = {student.keys[one]: one for one in student.added | student.special}
    named.pop(None if student.unknown is None else student.keys[student.unknown], None)
    of_text = student.text_ids.get
    ids = np.array([of_text(data, -1) for data in teacher.content], dtype=np.int64)
    for token_id in teacher.special:
        ids[token_id] = named.get(teacher.keys[token_id], -1)
    for token_id in teacher.added:
        data = teacher.content[token_id]
        if ids[token_id] < 0 and data is not None:
            other = b"=" if token_id in teacher.special else b"+"
            ids[token_id] = named.get(other + data, -1)
    if teacher.unknown is not None:
        ids[teacher.unknown] = -1
    teacher_end, student_end = ends
    if isinstance(teacher_end, int) and isinstance(student_end, int):
        ids[teacher_end] = student_end
    return VocabularyMap(
        student_ids=ids,
        num_student_ids=len(student),
        teacher_sha256=teacher.sha256,
        student_sha256=student.sha256,
    )


def write_map(folder: Path, vocabulary_map: VocabularyMap) -> None:
    """Commit the map as one file; equal maps give equal bytes.

    Raises:
        UserError: where the file system refuses.
    """
    content = {
        "num_student_ids": vocabulary_map.num_student_ids,
        "sha256": vocabulary_map.sha256,
        "student_ids": vocabulary_map.student_ids.tolist(),
        "student_sha256": vocabulary_map.student_sha256,
        "teacher_sha256": vocabulary_map.teacher_sha256,
    }
    write_bytes_atomically(folder / MAP_FILE, (canonical_json(content) + "\n").encode())


def read_map(folder: Path) -> VocabularyMap:
    """Read back what `write_map` wrote.

    Raises:
        UserError: if the file is missing or cannot be understood.
        CheckFailed: if it was changed.
    """
    path = folder / MAP_FILE
    remedy = "re-run cache-teacher with the same settings, which writes it again"
    try:
        content = json.loads(path.read_bytes())
        found = VocabularyMap(
            student_ids=np.array(content["student_ids"], dtype=np.int64),
            num_student_ids=content["num_student_ids"],
            teacher_sha256=content["teacher_sha256"],
            student_sha256=content["student_sha256"],
        )
        recorded = content["sha256"]
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing, so the cache's ids have no meaning: {remedy}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no vocabulary map ({error}): {remedy}") from error
    if found.sha256 != recorded:
        raise CheckFailed(f"{path} was changed: its hash is not the one it records; {remedy}")
    return found


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
