"""Which layer of the student matches which cached layer of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.config import LAST_STATES


class LayerPair(NamedTuple):
    """A layer of the student and the cached one that it matches, both counted from 0.

    The teacher's may be `LAST_STATES`.
    """

    student: int
    teacher: int


def layer_pairs(
    cached: Sequence[int],
    num_layers: int,
    given: Sequence[tuple[int, int]] = (),
    *,
    option: str,
) -> tuple[LayerPair, ...]:
    """The pairs that are matched.

    Unless they are given, layer i of n goes to round(i m / n) of the m cached, both counted from
    1: the last to the last, the others in proportion. A half goes to the even number, and a layer
    that rounds to 0 lies below the first cached one and matches none.

    Args:
        cached: the teacher's layers in the cache, counted from 0, ascending, then `LAST_STATES` if
            it holds them; at least one.
        num_layers: n of the student.
        given: pairs of a student's and a teacher's layer, counted from 0; none for the default.
        option: that gives them, for a message.

    Raises:
        UserError: for a layer that the student or the cache does not have, or that is given twice.
    """
    if not given:
        num = len(cached)
        nearest = [round(i * num / num_layers) for i in range(1, num_layers + 1)]
        return tuple(LayerPair(i, cached[k - 1]) for i, k in enumerate(nearest) if k)
    for student, teacher in given:
        if student >= num_layers:
            raise UserError(
                f"{option} {shown(given)} names layer {student} of the student, which has "
                f"{num_layers}, 0 to {num_layers - 1}: name one of these"
            )
        if teacher not in cached:
            there = ", ".join(map(_name, cached))
            raise UserError(
                f"{option} {shown(given)} names layer {_name(teacher)} of the teacher, and the "
                f"cache holds {there}: name one of these, or make a cache with that layer"
            )
    if len({student for student, _ in given}) < len(given):
        raise UserError(
            f"{option} {shown(given)} names a layer of the student twice: give each one partner"
        )
    return tuple(LayerPair(*pair) for pair in given)


def shown(pairs: Sequence[tuple[int, int]]) -> str:
    """As the options write pairs: `0:1,3:last`."""
    return ",".join(f"{student}:{_name(teacher)}" for student, teacher in pairs)


def _name(layer: int) -> str:
    return "last" if layer == LAST_STATES else str(layer)
