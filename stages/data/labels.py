"""Labels as a source writes them (integers, names, class features), and as a teacher's classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features

from teacher_cache.cache.errors import UserError, did_you_mean

MISSING_LABEL = -1
SHORTEST_BEGINNING = 3  # letters: of `neg` there is little doubt, of `n` there is
_GENERIC_NAME = re.compile(r"label_\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Labels:
    """The labels of one split.

    Attributes:
        ids: int64 [num_documents]; an index into `names` where there are names.
        names: class names in id order, None when the source only holds integers.
        names_are_ordered: whether the order of `names` was given (a class feature, or the user)
            rather than found by sorting.
    """

    ids: np.ndarray
    names: tuple[str, ...] | None
    names_are_ordered: bool

    def counts(self) -> dict[str, int]:
        """Number of documents per class, by name where there are names, else by integer."""
        counted = Counter(self.ids.tolist())
        return {self.describe(class_id): counted[class_id] for class_id in sorted(counted)}

    def describe(self, class_id: int) -> str:
        """The name of a class, or its integer when it has none."""
        return str(class_id) if self.names is None else self.names[class_id]


def read_labels(
    table: pa.Table, features: Features, column: str, label_names: Sequence[str] | None
) -> Labels:
    """Read a label column whole, and check that it can be learned from.

    Args:
        table: the split.
        features: its columns' types; a class feature brings its names.
        column: the label column.
        label_names: the user's names in class-id order, if any were given.

    Raises:
        UserError: if labels are missing, are neither integers nor names, fall outside
            `label_names`, or are all of one class.
    """
    values = table.column(column)
    feature = features[column]
    if isinstance(feature, ClassLabel):
        own_names = tuple(feature.names)
        ids = _with_missing(pc.cast(values, pa.int64()))
        labels = Labels(ids, own_names, names_are_ordered=True)
        _refuse_missing(labels.ids, column)
        labels = _reorder(labels, label_names)
    elif _holds_text(values.type):
        labels = _read_text(values, column, label_names)
    elif pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        labels = _from_integers(_with_missing(pc.cast(values, pa.int64())), column, label_names)
    elif pa.types.is_floating(values.type) or pa.types.is_null(values.type):
        labels = _from_integers(_whole_numbers(values, column), column, label_names)
    else:
        raise UserError(
            f"the label column {column!r} holds {values.type}, expected integers or names: name "
            f"another one with --label-column"
        )
    _refuse_one_class(labels, column)
    return labels


def _holds_text(column_type: pa.DataType) -> bool:
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def _with_missing(values: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(values, MISSING_LABEL).to_numpy()


def _whole_numbers(values: pa.ChunkedArray, column: str) -> np.ndarray:
    """Floats that are really integers: a reader's way of writing a column with gaps."""
    numbers = pc.cast(values, pa.float64()).to_numpy()
    numbers = np.where(np.isnan(numbers), MISSING_LABEL, numbers)
    fractional = numbers[numbers != np.floor(numbers)]
    if len(fractional):
        raise UserError(
            f"the label column {column!r} holds fractions such as {fractional[0]:g}, expected "
            f"integers or names: name another one with --label-column"
        )
    return numbers.astype(np.int64)


def _read_text(values: pa.ChunkedArray, column: str, label_names: Sequence[str] | None) -> Labels:
    """Names, or integers written as text (every csv holds nothing else)."""
    # pyarrow makes its compute functions at import, where pyright cannot see them.
    trim = pc.utf8_trim_whitespace  # pyright: ignore[reportAttributeAccessIssue]
    stripped = pc.fill_null(trim(values), "")
    encoded = stripped.combine_chunks().dictionary_encode()
    written = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    present = [name for name in written if name]
    if all(_is_integer(name) for name in present):
        numbers = [int(name) if name else MISSING_LABEL for name in written]
        return _from_integers(np.array(numbers, dtype=np.int64)[codes], column, label_names)
    names = tuple(label_names) if label_names is not None else tuple(sorted(present))
    for name in present:
        if name not in names:
            raise UserError(
                f"the label {name!r} in column {column!r} is not among the label names "
                f"({', '.join(names)}): {did_you_mean(name, names)}"
            )
    id_of = {name: class_id for class_id, name in enumerate(names)} | {"": MISSING_LABEL}
    ids = np.array([id_of[name] for name in written], dtype=np.int64)[codes]
    _refuse_missing(ids, column)
    return Labels(ids, names, names_are_ordered=label_names is not None)


def _is_integer(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit()


def _from_integers(ids: np.ndarray, column: str, label_names: Sequence[str] | None) -> Labels:
    _refuse_missing(ids, column)
    names = tuple(label_names) if label_names is not None else None
    if names is not None and len(ids) and not 0 <= ids.min() <= ids.max() < len(names):
        raise UserError(
            f"the label column {column!r} holds the integers {ids.min()} to {ids.max()}, and "
            f"{len(names)} label names were given: give one name for each of 0 to {ids.max()}"
        )
    return Labels(ids, names, names_are_ordered=names is not None)


def _reorder(labels: Labels, label_names: Sequence[str] | None) -> Labels:
    """Give a class feature's ids the order that the user's names ask for."""
    if label_names is None or labels.names is None:
        return labels
    if set(label_names) != set(labels.names):
        raise UserError(
            f"the label names given are {', '.join(label_names)}, and the data set's are "
            f"{', '.join(labels.names)}: give those, in the order of the teacher's classes"
        )
    new_ids = np.array([list(label_names).index(name) for name in labels.names], dtype=np.int64)
    return Labels(new_ids[labels.ids], tuple(label_names), names_are_ordered=True)


def _refuse_missing(ids: np.ndarray, column: str) -> None:
    num_missing = int((ids == MISSING_LABEL).sum())
    if num_missing:
        raise UserError(
            f"{num_missing:,} of {len(ids):,} documents have no label in column {column!r} (null "
            f"or -1): read them with --unlabeled, or name another split or --label-column"
        )


def _refuse_one_class(labels: Labels, column: str) -> None:
    counts = labels.counts()
    if len(counts) == 1:
        ((name, count),) = counts.items()
        raise UserError(
            f"all {count:,} documents have the label {name!r} in column {column!r}, expected at "
            f"least two classes: name another split or --label-column, or use --unlabeled"
        )


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
