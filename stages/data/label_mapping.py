"""From a corpus's labels to the class ids of a teacher; never by guessing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from teacher_cache.cache.errors import UserError

SHORTEST_BEGINNING = 3  # letters: of `neg` there is little doubt, of `n` there is
_GENERIC_NAME = re.compile(r"label_\d+", re.IGNORECASE)


def map_labels(
    values: Sequence[str] | Sequence[int],
    teacher_id2label: Mapping[int, str],
    explicit: Sequence[str] | None = None,
    *,
    names_are_ordered: bool = False,
) -> dict[str | int, int]:
    """Decide which of the teacher's classes each label of a corpus means.

    Integers are class ids as they stand. Names are looked up among the teacher's, whatever their
    case, and a beginning will do (`neg` is `NEGATIVE`). A teacher whose classes are called
    `LABEL_0`, `LABEL_1` says nothing about names: then `explicit` must give them in class-id
    order, unless the corpus's own order was given by whoever published it.

    Args:
        values: the distinct labels of the corpus, all integers or all names.
        teacher_id2label: the teacher's class names by id.
        explicit: the corpus's names in the order of the teacher's classes.
        names_are_ordered: whether `values` are names already in class-id order.

    Returns:
        The class id of each value.

    Raises:
        UserError: if a label is none of the teacher's classes, or nothing tells which it is.
    """
    integers = [value for value in values if isinstance(value, int)]
    if integers:
        _check_range(integers, teacher_id2label)
        return {value: value for value in integers}
    names = [str(value) for value in values]
    if explicit is not None:
        _check_explicit(names, explicit, teacher_id2label)
        ids = {name.casefold(): class_id for class_id, name in enumerate(explicit)}
        return {name: ids[name.casefold()] for name in names}
    found = {name: _class_id(name, teacher_id2label) for name in names}
    unknown = [name for name, class_id in found.items() if class_id is None]
    if not unknown and len(set(found.values())) == len(names):
        return {name: class_id for name, class_id in found.items() if class_id is not None}
    if names_are_ordered and is_generic(teacher_id2label):
        _check_range(range(len(names)), teacher_id2label)
        return {name: class_id for class_id, name in enumerate(names)}
    if is_generic(teacher_id2label):
        raise UserError(
            f"the corpus has the labels {', '.join(names)}, and the teacher's classes have no "
            f"names ({_listed(teacher_id2label)}): give the labels in the order of its classes, "
            f"for example --label-names {','.join(names)}"
        )
    raise UserError(
        f"the label{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} of the corpus "
        f"{'are' if len(unknown) > 1 else 'is'} none of the teacher's classes "
        f"({_listed(teacher_id2label)}): say which label is which class with --label-names, in "
        f"the order of the classes, or use another teacher"
    )


def _class_id(name: str, teacher_id2label: Mapping[int, str]) -> int | None:
    """The one class of this name, or of which this is the beginning, or the other way round."""
    wanted = name.casefold()
    own = {class_id: label.casefold() for class_id, label in teacher_id2label.items()}
    exact = [class_id for class_id, label in own.items() if label == wanted]
    alike = [
        class_id
        for class_id, label in own.items()
        if min(len(label), len(wanted)) >= SHORTEST_BEGINNING
        and (label.startswith(wanted) or wanted.startswith(label))
    ]
    matches = exact or alike
    return matches[0] if len(matches) == 1 else None


def is_generic(teacher_id2label: Mapping[int, str]) -> bool:
    """Whether the teacher's class names are the placeholders that transformers writes."""
    return all(_GENERIC_NAME.fullmatch(name) for name in teacher_id2label.values())


def _check_range(ids: Sequence[int], teacher_id2label: Mapping[int, str]) -> None:
    outside = sorted(class_id for class_id in ids if class_id not in teacher_id2label)
    if outside:
        raise UserError(
            f"the corpus has the label{'s' if len(outside) > 1 else ''} "
            f"{', '.join(map(str, outside))}, and the teacher has {len(teacher_id2label)} classes "
            f"({_listed(teacher_id2label)}): use another teacher or another --label-column"
        )


def _check_explicit(
    names: Sequence[str], explicit: Sequence[str], teacher_id2label: Mapping[int, str]
) -> None:
    given = [name.casefold() for name in explicit]
    unknown = [name for name in names if name.casefold() not in given]
    if unknown:
        raise UserError(
            f"the corpus has the labels {', '.join(names)}, and --label-names gives "
            f"{', '.join(explicit)}: add {', '.join(unknown)}"
        )
    if len(set(given)) != len(given):
        raise UserError(f"--label-names gives a name twice: {', '.join(explicit)}")
    _check_range(range(len(explicit)), teacher_id2label)
    own = [_class_id(name, teacher_id2label) for name in explicit]
    if None not in own and own != list(range(len(own))):
        raise UserError(
            f"--label-names gives the order {', '.join(explicit)}, and the teacher's classes are "
            f"{_listed(teacher_id2label)}: give the teacher's order, or leave the option out"
        )


def _listed(teacher_id2label: Mapping[int, str]) -> str:
    return ", ".join(f"{class_id} {name}" for class_id, name in sorted(teacher_id2label.items()))
