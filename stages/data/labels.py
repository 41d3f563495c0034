"""Labels as a source writes them (integers, names, class features), and as a teacher's classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features

from teacher_cache.cache.errors import UserError, did_you_mean

MissingLabels = Literal["refuse", "drop", "unlabeled"]


class AnyLabels(Protocol):
    """The labels of one split, as a kind of head reads them.

    Attributes:
        plural: what they are called.
    """

    plural: ClassVar[str]

    @property
    def is_missing(self) -> np.ndarray:
        """[num_documents] bool."""
        ...

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the classes, in id order; None where there are none."""
        ...

    def counts(self) -> dict[str, int]:
        """Number of documents per class; empty of numbers."""
        ...

    def at(self, positions: np.ndarray, /) -> Self:
        """Those of some documents."""
        ...

    def of_document(self, idx: int, /) -> Label | None:
        """A document's; None where it has none."""
        ...

    def constant(self) -> str | None:
        """The label that all documents have; None where they differ."""
        ...

    def class_names(self) -> tuple[str, ...]:
        """Names for every class id, to fine-tune a new teacher with.

        Raises:
            UserError: if a label is missing, or none of a class.
        """
        ...

    def of_classes(
        self,
        teacher_id2label: Mapping[int, str],
        explicit: Sequence[str] | None,
        label_map: Sequence[str] | None,
        /,
    ) -> tuple[AnyLabels, dict[str | int, int]]:
        """The same labels as a teacher's class ids, and which it is of each value.

        Raises:
            UserError: if a label is none of the teacher's, or nothing tells which it is.
        """
        ...

    def described(self, class_ids: Mapping[str | int, int], counts: Mapping[str, int], /) -> str:
        """For people, once they are a teacher's."""
        ...


LabelsT = TypeVar("LabelsT", bound=AnyLabels)
Label = Any
"""Of a document, as its head reads it: a class id, a number, or a tuple of 0 or 1 a class."""
MISSING_LABEL = -1
SHORTEST_BEGINNING = 3  # letters: of `neg` there is little doubt, of `n` there is
_GENERIC_NAME = re.compile(r"label_\d+", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
# What a teacher of ratings calls its classes: `1 star`, `2 stars`.
_LEADING_INTEGER = re.compile(r"[+-]?\d+(?=$|[ _-])", re.ASCII)
_TRUTH = {"false": 0, "true": 1}
# How pandas and numpy write that there is no value; the second are words of some classes, too.
_NOTHING, _NOTHING_AMONG_NUMBERS = {"nan", "<na>"}, {"none", "null", "na", "n/a"}
_NUM_NAMED = 5  # labels in a message


@dataclass(frozen=True)
class Labels:
    """The labels of one split.

    Attributes:
        ids: int64 [num_documents]; an index into `names` where there are names; `MISSING_LABEL`
            where a document has none.
        names: class names in id order, None when the source only holds integers.
        names_are_ordered: whether the order of `names` was given (a class feature, or the user)
            rather than found by sorting.
    """

    plural: ClassVar[str] = "classes"

    ids: np.ndarray
    names: tuple[str, ...] | None
    names_are_ordered: bool

    @property
    def is_missing(self) -> np.ndarray:
        """[num_documents] bool."""
        return self.ids == MISSING_LABEL

    def counts(self) -> dict[str, int]:
        """Number of documents per class, by name where there are names, else by integer."""
        counted = Counter(self.ids[~self.is_missing].tolist())
        return {self.describe(class_id): counted[class_id] for class_id in sorted(counted)}

    def describe(self, class_id: int) -> str:
        """The name of a class, or its integer when it has none."""
        return str(class_id) if self.names is None else self.names[class_id]

    def at(self, positions: np.ndarray) -> Labels:
        """Those of some documents."""
        return replace(self, ids=self.ids[positions])

    def of_document(self, idx: int) -> int | None:
        """A document's class id; None where it has none."""
        class_id = int(self.ids[idx])
        return None if class_id == MISSING_LABEL else class_id

    def constant(self) -> str | None:
        """The label that all documents have; None where they differ."""
        counts = self.counts()
        return next(iter(counts)) if len(counts) == 1 else None

    def described(self, class_ids: Mapping[str | int, int], counts: Mapping[str, int]) -> str:
        """Which label is which of the teacher's classes, and how many documents have it."""
        return ", ".join(
            f"{value} ({counts.get(str(value), 0):,}) is {class_id} {self.describe(class_id)}"
            for value, class_id in class_ids.items()
        )

    def class_names(self) -> tuple[str, ...]:
        """Names for every class id, to fine-tune a new teacher with.

        Raises:
            UserError: if a label is missing or below 0, or two differ in their spelling alone.
        """
        if self.is_missing.any():
            raise UserError(
                f"{int(self.is_missing.sum()):,} documents have no label, and a teacher needs "
                "labelled text: leave them out with --missing-labels drop"
            )
        if self.names is not None:
            for one, other in zip(*[iter(_alike(self.names))] * 2, strict=False):
                raise UserError(
                    f"the labels {one!r} and {other!r} differ in their spelling alone, and may be "
                    "one class or two: spell them alike, or as different words"
                )
            return self.names
        if self.ids.min() < 0:
            raise UserError(
                f"the corpus has the label {self.ids.min()}, expected integers from 0: name "
                f"another --label-column"
            )
        # The placeholders of transformers, so that integers stay integers for such a teacher.
        return tuple(f"LABEL_{class_id}" for class_id in range(int(self.ids.max()) + 1))

    def of_classes(
        self,
        teacher_id2label: Mapping[int, str],
        explicit: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> tuple[Labels, dict[str | int, int]]:
        """The same labels as a teacher's class ids, and which it is of each value.

        Names are the teacher's, or where those are placeholders (`LABEL_0`) the corpus's own.

        Args:
            teacher_id2label: the teacher's class names by id.
            explicit: the user's names in class-id order, if any were given.
            label_map: as in `map_labels`.

        Raises:
            UserError: as `map_labels`.
        """
        values: Sequence[str] | Sequence[int]
        values = np.unique(self.ids[~self.is_missing]).tolist()
        if self.names is not None:
            # All of an order that was given; of names that were found, all occur.
            values = self.names
        class_ids = map_labels(
            values,
            teacher_id2label,
            explicit if self.names is not None else None,
            names_are_ordered=self.names_are_ordered,
            label_map=label_map,
        )
        ids = self.ids.copy()
        for own, value in enumerate(values):
            chosen = self.ids == (own if self.names is not None else value)
            ids[chosen] = class_ids[value]
        own_names: dict[int, str] = {}
        if self.names is not None and is_generic(teacher_id2label):
            # The corpus knows what the teacher's LABEL_0 is called.
            own_names = {class_id: str(name) for name, class_id in class_ids.items()}
        names = tuple(
            own_names.get(class_id, teacher_id2label[class_id])
            for class_id in range(len(teacher_id2label))
        )
        return Labels(ids, names, names_are_ordered=True), class_ids


def _alike(names: Sequence[str]) -> list[str]:
    """The first two that differ in their spelling alone, or none."""
    first: dict[str, str] = {}
    for name in names:
        if spelled(name) in first:
            return [first[spelled(name)], name]
        first[spelled(name)] = name
    return []


def spelled(name: str) -> str:
    """A name whatever its case, how its accents are composed and what stands between its words.

    >>> spelled("Not_Spam ") == spelled("not spam")
    True
    """
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()


def read_labels(
    table: pa.Table,
    features: Features,
    column: str,
    label_names: Sequence[str] | None = None,
    label_map: Sequence[str] | None = None,
) -> Labels:
    """Read a label column whole; null, an empty text and -1 are no label.

    Args:
        table: the split.
        features: its columns' types; a class feature brings its names.
        column: the label column.
        label_names: the user's names in class-id order, if any were given.
        label_map: as in `map_labels`; a number that it names is a label, -1 too.

    Raises:
        UserError: if labels are neither integers nor names, or fall outside `label_names`.
    """
    values = table.column(column)
    feature = features[column]
    if isinstance(feature, ClassLabel):
        ids = _with_missing(values, column)
        return _reorder(Labels(ids, tuple(feature.names), names_are_ordered=True), label_names)
    if pa.types.is_boolean(values.type):
        values = pc.cast(values, pa.string())
    names_missing = any(_pair(one)[0] == str(MISSING_LABEL) for one in label_map or ())
    if names_missing and pa.types.is_integer(values.type):
        values = pc.cast(values, pa.string())
    if _holds_text(values.type):
        return _read_text(values, column, label_names, are_names=names_missing)
    if pa.types.is_integer(values.type):
        return _from_integers(_with_missing(values, column), column, label_names)
    numeric = (pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if any(is_kind(values.type) for is_kind in numeric):
        return _from_integers(_whole_numbers(values, column), column, label_names)
    several = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    raise UserError(
        f"the label column {column!r} holds {values.type}, expected integers or names: "
        + (
            "several labels a document (multi-label) are of a multi-label teacher, and this one "
            "chooses one: write one of them"
            if several or pa.types.is_fixed_size_list(values.type)
            else "name another one with --label-column"
        )
    )


def settle_missing(
    labels: LabelsT | None, policy: MissingLabels, column: str | None, num: int
) -> tuple[LabelsT | None, np.ndarray]:
    """What becomes of documents without a label, and whether the others can be learned from.

    Args:
        labels: None where none are read.
        policy: of `--missing-labels`.
        column: of the labels, for a message.
        num: documents.

    Returns:
        The labels, None if there are none; and [num] bool: the documents that are kept.

    Raises:
        UserError: if labels are missing and that was not allowed, or are all of one class.
    """
    keeps_all = np.ones(num, bool)
    if labels is None:
        return None, keeps_all
    num_missing = int(labels.is_missing.sum())
    if num_missing and (policy == "refuse" or (policy == "drop" and num_missing == num)):
        raise UserError(
            f"{num_missing:,} of {num:,} documents have no label in column {column!r} (null or "
            "-1, unless --label-map names it): leave them out with --missing-labels drop, keep "
            "them for what the teacher says with --missing-labels unlabeled, read the whole as "
            "--unlabeled, or name another split or --label-column"
        )
    if num_missing == num:
        return None, keeps_all
    name = labels.constant()
    if name is not None:
        raise UserError(
            f"all {num - num_missing:,} documents have the label {name!r} in column {column!r}, "
            f"expected at least two {labels.plural}: name another split or --label-column, or use "
            "--unlabeled"
        )
    return labels, ~labels.is_missing if policy == "drop" else keeps_all


def _holds_text(column_type: pa.DataType) -> bool:
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def _with_missing(values: pa.ChunkedArray, column: str) -> np.ndarray:
    try:
        return pc.fill_null(pc.cast(values, pa.int64()), MISSING_LABEL).to_numpy().copy()
    except pa.ArrowInvalid as error:
        raise UserError(
            f"the label column {column!r} holds integers that are no classes ({error}): name "
            "another one with --label-column"
        ) from error


def _whole_numbers(values: pa.ChunkedArray, column: str) -> np.ndarray:
    """Floats that are really integers: a reader's way of writing a column with gaps."""
    numbers = pc.cast(values, pa.float64()).to_numpy()
    numbers = np.where(np.isnan(numbers), MISSING_LABEL, numbers)
    _refuse_fractions(numbers, column)
    return numbers.astype(np.int64)


def _refuse_fractions(numbers: np.ndarray, column: str) -> None:
    fractional = numbers[numbers != np.floor(numbers)]
    if len(fractional) or not np.isfinite(numbers).all():
        shown = fractional[0] if len(fractional) else numbers[~np.isfinite(numbers)][0]
        raise UserError(
            f"the label column {column!r} holds fractions such as {shown:g}, expected "
            f"integers or names: name another one with --label-column"
        )


def _read_text(
    values: pa.ChunkedArray,
    column: str,
    label_names: Sequence[str] | None,
    *,
    are_names: bool = False,
) -> Labels:
    """Names, or integers written as text (every csv holds nothing else) unless they are names."""
    # pyarrow makes its compute functions at import, where pyright cannot see them.
    trim = pc.utf8_trim_whitespace  # pyright: ignore[reportAttributeAccessIssue]
    stripped = pc.fill_null(trim(values), "")
    encoded = stripped.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    written = ["" if one.lower() in _NOTHING else one for one in encoded.dictionary.to_pylist()]
    present = [name for name in written if name]
    says_truth = _TRUTH.keys() & {name.lower() for name in label_names or ()}
    if not says_truth and {name.lower() for name in present} <= _TRUTH.keys():
        written = [str(_TRUTH[name.lower()]) if name else name for name in written]
        present = [name for name in written if name]
    numbers = [name for name in present if name.lower() not in _NOTHING_AMONG_NUMBERS]
    if not are_names and all(map(_NUMBER.fullmatch, numbers)) and (numbers or not present):
        if not all(map(_INTEGER.fullmatch, numbers)):
            _refuse_fractions(np.array([float(name) for name in numbers]), column)
        id_of = {name: int(float(name)) for name in numbers}
        ids = [id_of.get(name, MISSING_LABEL) for name in written]
        return _from_integers(np.array(ids, dtype=np.int64)[codes], column, label_names)
    if not are_names:  # a number among names that is no label, as in the integers
        written = ["" if name == str(MISSING_LABEL) else name for name in written]
    present = [name for name in written if name]
    _refuse_several(present, column)
    names = tuple(label_names) if label_names is not None else tuple(sorted(present))
    id_of = {spelled(name): class_id for class_id, name in enumerate(names)}
    id_of |= {name: class_id for class_id, name in enumerate(names)} | {"": MISSING_LABEL}
    for name in present:
        if name not in id_of and spelled(name) not in id_of:
            raise UserError(
                f"the label {name!r} in column {column!r} is not among the label names "
                f"({', '.join(names)}): {did_you_mean(name, names)}"
            )
    ids = [id_of[name] if name in id_of else id_of[spelled(name)] for name in written]
    found = np.array(ids, dtype=np.int64)[codes]
    return Labels(found, names, names_are_ordered=label_names is not None)


def _refuse_several(names: Sequence[str], column: str) -> None:
    """Refuse what names several labels: a list, or a name made of others or of parts of others.

    A comma may be part of a name, as in `Albany, NY`.

    Raises:
        UserError: naming one.
    """
    parts = {name: [part.strip() for part in re.split(r"[,;|]", name)] for name in names}
    num = Counter(part for name in names for part in {*parts[name]})
    for name in names:
        is_list = name[0] in "[(" and name[-1] in ")]"
        is_made = len(parts[name]) > 1 and (
            {*parts[name]} <= {*names}
            or (re.search("[;|]", name) and any(num[one] > 1 for one in parts[name]))
        )
        if is_list or is_made:
            raise UserError(
                f"the label column {column!r} holds {name!r}, several labels a document "
                "(multi-label), and the teacher chooses one: write one of them, or for a "
                "multi-label teacher lists or columns of 0 and 1"
            )


def _from_integers(ids: np.ndarray, column: str, label_names: Sequence[str] | None) -> Labels:
    names = tuple(label_names) if label_names is not None else None
    given = ids[ids != MISSING_LABEL]
    if names is not None and len(given) and not 0 <= given.min() <= given.max() < len(names):
        raise UserError(
            f"the label column {column!r} holds the integers {given.min()} to {given.max()}, and "
            f"{len(names)} label names were given: give one name for each of 0 to {given.max()}"
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
    ids = np.where(labels.is_missing, MISSING_LABEL, new_ids[labels.ids])
    return Labels(ids, tuple(label_names), names_are_ordered=True)


def map_labels(
    values: Sequence[str] | Sequence[int],
    teacher_id2label: Mapping[int, str],
    explicit: Sequence[str] | None = None,
    *,
    names_are_ordered: bool = False,
    label_map: Sequence[str] | None = None,
) -> dict[str | int, int]:
    """Decide which of the teacher's classes each label of a corpus means.

    Integers are class ids as they stand, unless the teacher's own names are other integers. Names
    are looked up among the teacher's, whatever their spelling, and a beginning will do (`neg` is
    `NEGATIVE`). A teacher whose classes are called `LABEL_0`, `LABEL_1` says nothing about names:
    then `explicit` must give them in class-id order, unless the corpus's own order was given by
    whoever published it.

    Args:
        values: the distinct labels of the corpus, all integers or all names.
        teacher_id2label: the teacher's class names by id.
        explicit: the corpus's names in the order of the teacher's classes.
        names_are_ordered: whether `values` are names already in class-id order.
        label_map: what the user says, `label=class` each, by the class's name or id; then nothing
            else decides.

    Returns:
        The class id of each value.

    Raises:
        UserError: if a label is none of the teacher's classes, nothing tells which it is, or it may
            be two.
    """
    if label_map is not None:
        return _by_map(values, label_map, teacher_id2label)
    integers = [value for value in values if isinstance(value, int)]
    if integers:
        return _of_integers(integers, teacher_id2label)
    names = [str(value) for value in values]
    if explicit is not None:
        _check_explicit(names, explicit, teacher_id2label)
        ids = {spelled(name): class_id for class_id, name in enumerate(explicit)}
        return {name: ids[spelled(name)] for name in names}
    found = {name: _class_id(name, teacher_id2label) for name in names}
    unknown = [name for name, class_id in found.items() if class_id is None]
    if not unknown:
        known = {name: class_id for name, class_id in found.items() if class_id is not None}
        _refuse_shared(known, teacher_id2label)
        return {**known}
    if names_are_ordered and is_generic(teacher_id2label):
        _check_range(range(len(names)), teacher_id2label)
        return {name: class_id for class_id, name in enumerate(names)}
    if is_generic(teacher_id2label):
        raise UserError(
            f"the corpus has the labels {', '.join(names)}, and the teacher's classes have no "
            f"names ({_listed(teacher_id2label)}): give the labels in the order of its classes, "
            f"for example --label-names {','.join(names)}"
        )
    if all(map(_INTEGER.fullmatch, names)):  # of a class feature
        by_number = _of_integers([int(float(name)) for name in names], teacher_id2label)
        return {name: by_number[int(float(name))] for name in names}
    if all(map(_GENERIC_NAME.fullmatch, names)):
        # Placeholders of transformers are the ids that they name.
        numbers = {name: int(name.rpartition("_")[2]) for name in names}
        _check_range(list(numbers.values()), teacher_id2label)
        return {**numbers}
    raise UserError(
        f"the label{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} of the corpus "
        f"{'are' if len(unknown) > 1 else 'is'} none of the teacher's classes "
        f"({_listed(teacher_id2label)}): say which label is which class with --label-map, as in "
        f"--label-map '{unknown[0]}={next(iter(teacher_id2label.values()))}', or with "
        "--label-names, in the order of the classes, or use another teacher"
    )


def _refuse_shared(class_ids: Mapping[str, int], teacher_id2label: Mapping[int, str]) -> None:
    """Refuse two names for one class, unless they differ in their spelling alone."""
    first: dict[int, str] = {}
    for name, class_id in class_ids.items():
        other = first.setdefault(class_id, name)
        if spelled(other) != spelled(name):
            label = teacher_id2label[class_id]
            raise UserError(
                f"the labels {other!r} and {name!r} of the corpus may both be the teacher's class "
                f"{class_id} {label}, or only one of them: say so with --label-map "
                f"'{other}={label},{name}=...', naming a class for every label"
            )


def _of_integers(
    integers: Sequence[int], teacher_id2label: Mapping[int, str]
) -> dict[str | int, int]:
    """Class ids as they stand, or by the teacher's names where those are other integers.

    Raises:
        UserError: if both are possible, or neither.
    """
    by_name = {_number_in(name): class_id for class_id, name in teacher_id2label.items()}
    names_all = None not in by_name and len(by_name) == len(teacher_id2label)
    fits_names = names_all and set(integers) <= by_name.keys()
    fits_ids = set(integers) <= teacher_id2label.keys()
    named = {value: by_name[value] for value in integers} if fits_names else {}
    if fits_names and fits_ids and any(value != class_id for value, class_id in named.items()):
        value, class_id = next((v, c) for v, c in named.items() if v != c)
        raise UserError(
            f"the label {value} may be the teacher's class {value} {teacher_id2label[value]!r} or "
            f"its class {class_id} {teacher_id2label[class_id]!r}: say which with --label-map "
            f"'{value}={teacher_id2label[class_id]},...', naming a class for every label"
        )
    if fits_names and not fits_ids:
        return {**named}
    _check_range(integers, teacher_id2label)
    return {value: value for value in integers}


def _number_in(name: str) -> int | None:
    """The integer that a class is called, as in `2 stars`; None of another name."""
    if name.strip().lower() in _TRUTH:
        return _TRUTH[name.strip().lower()]
    found = _LEADING_INTEGER.match(name.strip())
    return int(found[0]) if found else None


def _pair(pair: str) -> tuple[str, str]:
    """A label and a class of `--label-map`; the first is empty if there is no `=`."""
    label, _, called = pair.rpartition("=")
    return label.strip(), called.strip()


def _by_map(
    values: Sequence[str] | Sequence[int],
    label_map: Sequence[str],
    teacher_id2label: Mapping[int, str],
) -> dict[str | int, int]:
    """What `--label-map` says.

    Raises:
        UserError: if it is not of its form, leaves a label out or names no class.
    """
    by_name = {spelled(name): class_id for class_id, name in teacher_id2label.items()}
    by_name |= {name: class_id for class_id, name in teacher_id2label.items()}
    given: dict[str, int] = {}
    for pair in label_map:
        label, called = _pair(pair)
        class_id = by_name.get(called, by_name.get(spelled(called)))
        if class_id is None and called.isdecimal() and int(called) in teacher_id2label:
            class_id = int(called)
        if not label or class_id is None:
            raise UserError(
                f"--label-map has {pair!r}, expected a label and one of the teacher's classes "
                f"({_listed(teacher_id2label)}), as in '{values[0]}={teacher_id2label[0]}'"
            )
        given.setdefault(spelled(label), class_id)
        given.setdefault(str(_TRUTH.get(spelled(label))), class_id)
        given[label] = class_id
    of_value = {value: given.get(str(value), given.get(spelled(str(value)))) for value in values}
    missing = [str(value) for value, class_id in of_value.items() if class_id is None]
    if missing:
        raise UserError(
            f"--label-map says nothing of {_few(missing)}: name a class for every label, as in "
            f"'{missing[0]}={teacher_id2label[0]}'"
        )
    return {value: class_id for value, class_id in of_value.items() if class_id is not None}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} others" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more


def _class_id(name: str, teacher_id2label: Mapping[int, str]) -> int | None:
    """The one class of this name, or of which this is the beginning, or the other way round."""
    wanted = spelled(name)
    own = {class_id: spelled(label) for class_id, label in teacher_id2label.items()}
    same = [class_id for class_id, label in teacher_id2label.items() if label == name]
    exact = [class_id for class_id, label in own.items() if label == wanted]
    alike = [class_id for class_id, label in own.items() if _is_beginning(label, wanted)]
    matches = same or exact or alike
    return matches[0] if len(matches) == 1 else None


def _is_beginning(one: str, other: str) -> bool:
    """Whether one is the other cut short within a word, as `neg` is."""
    short, long = sorted((one, other), key=len)
    is_begun = len(short) >= SHORTEST_BEGINNING and long.startswith(short)
    return is_begun and long[len(short) :].isalpha()


def is_generic(teacher_id2label: Mapping[int, str]) -> bool:
    """Whether the teacher's class names are the placeholders that transformers writes."""
    return all(_GENERIC_NAME.fullmatch(name) for name in teacher_id2label.values())


def _check_range(ids: Sequence[int], teacher_id2label: Mapping[int, str]) -> None:
    outside = sorted(class_id for class_id in ids if class_id not in teacher_id2label)
    if outside:
        raise UserError(
            f"the corpus has the label{'s' if len(outside) > 1 else ''} "
            f"{_few(list(map(str, outside)))}, and the teacher has {len(teacher_id2label)} classes "
            f"({_listed(teacher_id2label)}): use another teacher or another --label-column, or say "
            "which label is which class with --label-map"
        )


def _check_explicit(
    names: Sequence[str], explicit: Sequence[str], teacher_id2label: Mapping[int, str]
) -> None:
    given = [spelled(name) for name in explicit]
    unknown = [name for name in names if spelled(name) not in given]
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
