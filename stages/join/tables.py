"""Do equal ids mean equal strings? The comparison that no option waives."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Generic, TypeVar

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
