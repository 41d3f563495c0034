"""How two vocabularies relate: may teacher logits be cut or extended to the student's size?

Only where equal ids mean the same (docs/maths.md, section 5). An embedding may have more rows than
its tokenizer has ids; such rows mean nothing, and leaving them out changes nothing. Where ids mean
other things, cutting at the smaller size compares probabilities of other tokens without any error
to show for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Generic, Literal, TypeVar

from teacher_cache.cache.errors import CheckFailed

Meaning = TypeVar("Meaning", bound=Hashable)
"""What a table gives for an id: the token's string, or the key of its bytes."""


@dataclass(frozen=True, kw_only=True)
class TableComparison(Generic[Meaning]):
    """Two id-to-string tables side by side.

    Attributes:
        num_differing: ids that mean another string, or nothing, on the other side.
        num_shared: strings that both tables hold, at whatever id.
        first_differing_id: the lowest such id, None when there is none.
        cache_string: what it means in the cache; None where it means nothing.
        student_string: what it means to the student.
    """

    num_differing: int
    num_shared: int
    first_differing_id: int | None
    cache_string: Meaning | None
    student_string: Meaning | None


def compare_tables(
    cache: Sequence[Meaning | None], student: Sequence[Meaning | None]
) -> TableComparison[Meaning]:
    """Compare two tables id by id; an id beyond a table's end means nothing there."""
    differing = [
        (token_id, ours, theirs)
        for token_id, (ours, theirs) in enumerate(zip_longest(cache, student))
        if ours != theirs
    ]
    first_id, ours, theirs = differing[0] if differing else (None, None, None)
    return TableComparison(
        num_differing=len(differing),
        num_shared=len((set(cache) & set(student)) - {None}),
        first_differing_id=first_id,
        cache_string=ours,
        student_string=theirs,
    )


def string_at(table: list[str | None], token_id: int | None) -> str:
    """An id with its string, for a message: `1996 'the'`."""
    if token_id is None:
        return "no token"
    string = table[token_id] if token_id < len(table) else None
    return f"{token_id} {string!r}" if string is not None else f"{token_id} (no string)"


RelationKind = Literal["identical", "padded", "different"]
WAYS_OUT = (
    "use --align map (exact byte strings) or --align spans (chunks of text), or a student of the "
    "teacher's tokenizer"
)


@dataclass(frozen=True, kw_only=True)
class VocabularyRelation:
    """Two vocabularies side by side, counted.

    Attributes:
        kind: `identical`: the same ids, meanings and rows. `padded`: every id that the teacher
            uses means the same to the student, and one of the two is longer. `different`: neither.
        teacher_rows: columns of the teacher's logits.
        student_rows: columns of the student's.
        num_teacher: ids that the teacher's tokenizer uses.
        num_student: ids that the student's uses.
        num_same_id: ids that mean the same on both sides.
        num_shared: strings that both have, at whatever id.
        num_differing_below_cut: ids below the smaller number of ids that differ in meaning.
        num_below_cut: the smaller number of ids.
    """

    kind: RelationKind
    teacher_rows: int
    student_rows: int
    num_teacher: int
    num_student: int
    num_same_id: int
    num_shared: int
    num_differing_below_cut: int
    num_below_cut: int

    @property
    def share_differing_below_cut(self) -> float:
        """What cutting at the smaller size would have meant: this share of ids is misread."""
        return self.num_differing_below_cut / self.num_below_cut if self.num_below_cut else 0.0

    @property
    def overlap(self) -> str:
        """The counts in words, for a message."""
        return (
            f"of the teacher's {self.num_teacher:,} ids {self.num_same_id:,} mean the same to the "
            f"student and {self.num_shared:,} strings are shared at any id; cut at "
            f"{self.num_below_cut:,}, {self.share_differing_below_cut:.2%} of the ids would mean "
            "another string"
        )

    @property
    def is_cut(self) -> bool:
        """Whether the student's table is the beginning of the teacher's."""
        return (
            not self.num_differing_below_cut
            and self.num_below_cut == self.student_rows
            and self.num_same_id > 0
        )

    def require_same_ids(
        self, option: str, *, counted: VocabularyRelation | None = None, ways_out: str = WAYS_OUT
    ) -> None:
        """Refuse to cut or extend where ids do not mean the same.

        Args:
            option: what asked for it, as the user wrote it: `--align truncate`.
            counted: the same tables by the bytes of their ids, for the message.
            ways_out: what to do instead, where the option stands.

        Raises:
            CheckFailed: if the vocabularies are different, with the overlap and the ways out.
        """
        if self.kind == "different":
            raise CheckFailed(
                f"{option} needs ids that mean the same to teacher and student; "
                f"{(counted or self).overlap}: "
                f"{ways_out}"
            )


def relate(
    teacher: Sequence[Meaning | None],
    student: Sequence[Meaning | None],
    *,
    teacher_rows: int | None = None,
    student_rows: int | None = None,
) -> VocabularyRelation:
    """Compare what the ids mean.

    Args:
        teacher: by id, the string or `TokenBytes.keys`; None where there is no token.
        student: the same of the student, in the same form.
        teacher_rows: columns of the teacher's logits; as many as there are ids by default.
        student_rows: columns of the student's.

    Raises:
        ValueError: if there are fewer rows than ids.
    """
    teacher_rows = len(teacher) if teacher_rows is None else teacher_rows
    student_rows = len(student) if student_rows is None else student_rows
    if teacher_rows < len(teacher) or student_rows < len(student):
        raise ValueError(
            f"{teacher_rows} and {student_rows} rows are too few for {len(teacher)} and "
            f"{len(student)} ids"
        )
    tables = compare_tables(teacher, student)
    num_teacher = sum(meaning is not None for meaning in teacher)
    pairs = list(zip(teacher, student, strict=False))
    num_same_id = sum(ours is not None and ours == theirs for ours, theirs in pairs)
    if not tables.num_differing and teacher_rows == student_rows:
        kind: RelationKind = "identical"
    else:
        kind = "padded" if num_same_id == num_teacher else "different"
    return VocabularyRelation(
        kind=kind,
        teacher_rows=teacher_rows,
        student_rows=student_rows,
        num_teacher=num_teacher,
        num_student=sum(meaning is not None for meaning in student),
        num_same_id=num_same_id,
        num_shared=tables.num_shared,
        num_differing_below_cut=sum(ours != theirs for ours, theirs in pairs),
        num_below_cut=len(pairs),
    )
