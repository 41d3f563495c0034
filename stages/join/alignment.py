"""How a language model's cached ids become the student's: decided once, at the join.

Where ids mean the same strings, they stay as they are (`same`), and a longer table of either side
is a matter of ids that the other never names. Where they do not, the student reads the text again
in tokens of its own (`aligned_sample`), and the teacher's ids are mapped by their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.join.aligned_sample import SampleAligner
from teacher_cache.stages.join.config import AlignMode
from teacher_cache.stages.join.report import ID_TABLE, JoinReport
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.tokens.record import id_to_string
from teacher_cache.stages.tokens.relation import VocabularyRelation, relate
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap, exact_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AlignmentKind = Literal["same", "pad", "truncate", "map", "spans", "projection"]
REREAD = ("map", "spans", "projection")
"""Modes in which the student's own tokenizer reads the text again."""
# What a longer table changes in the tokenizer's files, and nothing else.
_OF_THE_TABLE = {"tokenizer files", ID_TABLE}


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """From the cache's ids to the student's.

    Attributes:
        kind: how. `same`, `pad` and `truncate` keep ids and positions.
        teacher: the tokenizer that made the cached ids.
        student: the student's.
        relation: of the two tables; None where the student reads the text again.
        captured: the map that the cache's distributions went through at capture; None for most.
    """

    kind: AlignmentKind
    teacher: PreTrainedTokenizerBase
    student: PreTrainedTokenizerBase
    relation: VocabularyRelation | None = None
    captured: VocabularyMap | None = None

    @property
    def rereads(self) -> bool:
        """Whether the student reads the text again in tokens of its own."""
        return self.kind in REREAD

    @cached_property
    def tables(self) -> tuple[TokenBytes, TokenBytes]:
        """The bytes of the teacher's ids and of the student's.

        Raises:
            UserError: for a tokenizer whose tokens' bytes are not known.
        """
        return self.aligner.teacher.table, self.aligner.student.table

    @cached_property
    def relation_of_bytes(self) -> VocabularyRelation:
        """Of the two tables, by the bytes that their ids write.

        Raises:
            UserError: for a tokenizer whose tokens' bytes are not known.
        """
        return relate(*(table.keys for table in self.tables))

    @property
    def caveats(self) -> list[str]:
        """What either side's tokens do not keep of a text."""
        sides = {"teacher": self.aligner.teacher, "student": self.aligner.student}
        return [f"{side}: {one.caveat}" for side, one in sides.items() if one.caveat]

    @cached_property
    def vocabulary_map(self) -> VocabularyMap:
        """Where each of the teacher's ids goes; the two ends of text are one."""
        if self.captured is not None:
            return self.captured
        ends = self.teacher.eos_token_id, self.student.eos_token_id
        return exact_map(*self.tables, ends=ends)

    @cached_property
    def head_ids(self) -> np.ndarray | None:
        """int64 [V_t], the student's id for each id of the cached distributions, -1 for none.

        None where both sides' ids are the same.
        """
        if self.captured is not None:
            return np.arange(self.captured.num_student_ids)
        if self.kind in ("same", "pad"):
            return None
        if self.kind == "truncate":
            assert self.relation is not None, "truncation compares the tables"
            ids = np.arange(self.relation.teacher_rows)
            return np.where(ids < self.relation.student_rows, ids, -1)
        return self.vocabulary_map.student_ids

    @cached_property
    def aligner(self) -> SampleAligner:
        """What reads a sample's text again."""
        return SampleAligner(teacher=Reader.of(self.teacher), student=Reader.of(self.student))

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's settings record of it."""
        sha256 = self.vocabulary_map.sha256 if self.rereads else None
        return {"kind": self.kind, "map_sha256": sha256}


def align(
    *,
    mode: AlignMode,
    captured: VocabularyMap | None,
    tables: tuple[list[str | None], PreTrainedTokenizerBase],
    student: PreTrainedTokenizerBase,
    report: JoinReport,
) -> tuple[Alignment, JoinReport]:
    """Find the alignment, and what of the report is left to be let pass.

    Args:
        mode: as asked for.
        captured: the map that the cached distributions went through (`recorded_map`), or None.
        tables: the id-to-string table and the tokenizer of the cache.
        student: the student's tokenizer.
        report: of the comparison of the two tokenizers.

    Raises:
        CheckFailed: if `truncate` or `pad` is asked for and ids mean other strings, or the cached
            distributions are another table's.
        UserError: if the tokens' bytes of one side are not known.
    """
    table, teacher = tables
    sides: dict[str, Any] = {"teacher": teacher, "student": student}
    if captured is not None:
        return _of_an_aligned_cache(captured, mode, sides)
    if mode in REREAD:
        return Alignment(kind=mode, **sides), JoinReport(compared=(), differences=())
    relation = relate(table, id_to_string(student))
    kind: AlignmentKind = "same"
    if relation.kind == "padded":
        kind = "pad"
    elif relation.kind == "different" and mode == "truncate" and relation.is_cut:
        kind = "truncate"
    elif mode != "auto":
        counted = Alignment(kind="map", **sides).relation_of_bytes
        relation.require_same_ids(f"--align {mode}", counted=counted)
    if kind != "same":
        report = _without(report, _OF_THE_TABLE)
    return Alignment(kind=kind, relation=relation, **sides), report


def _of_an_aligned_cache(
    captured: VocabularyMap, mode: AlignMode, sides: dict[str, Any]
) -> tuple[Alignment, JoinReport]:
    """The cached distributions are a student's already; its positions are still to be found."""
    captured.require_student(token_bytes(sides["student"]))
    if mode not in ("auto", "map"):
        raise UserError(
            f"--align {mode} needs distributions over the teacher's own ids, and the cache's were "
            "mapped to the student's when it was made: leave the option out"
        )
    return (
        Alignment(kind="map", captured=captured, **sides),
        JoinReport(compared=(), differences=()),
    )


def _without(report: JoinReport, names: set[str]) -> JoinReport:
    """What is left where the ids of both tables mean the same."""
    left = tuple(one for one in report.differences if one.name not in names)
    return JoinReport(compared=report.compared, differences=left)


def require_known_ids(alignment: Alignment, largest_id: int) -> None:
    """Refuse cached samples that hold ids which a cut table lacks.

    Args:
        alignment: of kind `truncate`.
        largest_id: among the cached ids.

    Raises:
        CheckFailed: naming it.
    """
    assert alignment.relation is not None, "truncation compares the tables"
    rows = alignment.relation.student_rows
    if largest_id >= rows:
        raise CheckFailed(
            f"the cached samples hold id {largest_id:,}, and the student's table ends at {rows:,}, "
            "so it cannot read them: use --align map, which reads the text again"
        )
