"""Labels that are not one class a document: any number of labels, or a number.

Several are lists of them, or a column of 0 and 1 for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.labels import MISSING_LABEL, map_labels

_NOTHING = {"", "nan", "<na>", "none", "null", "na", "n/a"}
_ANSWERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_NUM_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class LabelSets:
    """The labels of one split.

    Attributes:
        has: int8 [num_documents, L], 1 where a document has a label, 0 where not; a row of
            `MISSING_LABEL` where it is not known what it has.
        values: the L labels, all names or all integers.
        are_ordered: whether their order was given, by a class feature, by columns, or by the user.
        are_columns: whether each was a column, so that what none says is not known.
    """

    plural: ClassVar[str] = "labels"

    has: np.ndarray
    values: tuple[str, ...] | tuple[int, ...]
    are_ordered: bool = False
    are_columns: bool = False

    @property
    def is_missing(self) -> np.ndarray:
        """[num_documents] bool."""
        return (self.has == MISSING_LABEL).any(axis=1)

    @property
    def names(self) -> tuple[str, ...] | None:
        """In the order of `has`; None of integers."""
        names = tuple(one for one in self.values if isinstance(one, str))
        return names if len(names) == len(self.values) else None

    def counts(self) -> dict[str, int]:
        """Number of documents that have each label, of those that some have."""
        num = (self.has == 1).sum(axis=0)
        found = zip(self.values, num.tolist(), strict=True)
        return {str(value): count for value, count in found if count}

    def at(self, positions: np.ndarray) -> LabelSets:
        """Those of some documents."""
        return replace(self, has=self.has[positions])

    def of_document(self, idx: int) -> tuple[int, ...] | None:
        """0 or 1 for each label; None where it is not known."""
        row = tuple(self.has[idx].tolist())
        return None if MISSING_LABEL in row else row

    def constant(self) -> str | None:
        """None: a label that all documents have says something beside others."""
        return None

    def class_names(self) -> tuple[str, ...]:
        """Names for every label, to fine-tune a new teacher with.

        Raises:
            UserError: if a document's labels are missing, or they are integers below 0.
        """
        if self.is_missing.any():
            raise UserError(
                f"of {int(self.is_missing.sum()):,} documents it is not known what labels they "
                "have, and a teacher needs labelled text: leave them out with --missing-labels drop"
            )
        if self.names is not None:
            return self.names
        integers = [int(value) for value in self.values]
        if min(integers) < 0:
            raise UserError(f"the corpus has the label {min(integers)}, expected integers from 0")
        return tuple(f"LABEL_{class_id}" for class_id in range(max(integers) + 1))

    def of_classes(
        self,
        teacher_id2label: Mapping[int, str],
        explicit: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> tuple[LabelSets, dict[str | int, int]]:
        """The same labels in the order of a teacher's, and which it is of each value.

        Raises:
            UserError: as `map_labels`, or if there are columns and none for a label of the
                teacher's.
        """
        names, integers = self.names, [one for one in self.values if isinstance(one, int)]
        class_ids = map_labels(
            integers if names is None else names,
            teacher_id2label,
            None if names is None else explicit,
            names_are_ordered=self.are_ordered,
            label_map=label_map,
        )
        untold = [teacher_id2label[i] for i in teacher_id2label if i not in class_ids.values()]
        if self.are_columns and untold:
            raise UserError(
                f"the teacher has the label {untold[0]!r}, of which none of the columns "
                f"{', '.join(map(str, self.values))} says anything: name a column for each label "
                "with --label-column, or say which is which with --label-map"
            )
        has = np.zeros((len(self.has), len(teacher_id2label)), np.int8)
        for own, value in enumerate(self.values):
            has[:, class_ids[value]] = np.maximum(has[:, class_ids[value]], self.has[:, own])
        has[self.is_missing] = MISSING_LABEL
        ordered = tuple(name for _, name in sorted(teacher_id2label.items()))
        if names is not None and all(one.startswith("LABEL_") for one in ordered):
            # The corpus knows what the teacher's LABEL_0 is called.
            own_names = {class_id: str(value) for value, class_id in class_ids.items()}
            ordered = tuple(own_names.get(i, one) for i, one in enumerate(ordered))
        return LabelSets(has, ordered, are_ordered=True), class_ids

    def described(self, class_ids: Mapping[str | int, int], counts: Mapping[str, int]) -> str:
        """Which label is which of the teacher's, and how many documents have it."""
        return ", ".join(
            f"{value} ({counts.get(str(value), 0):,}) is {class_id} {self.values[class_id]}"
            for value, class_id in class_ids.items()
        )


def are_sets(table: pa.Table, columns: Sequence[str]) -> bool:
    """Whether labels are lists, or stand in several columns."""
    if len(columns) > 1:
        return True
    values = table.column(columns[0])
    if _is_list(values.type):
        return True
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return False
    written = [one.strip() for one in values.to_pylist() if one and one.strip()]
    return bool(written) and all(one.startswith("[") and one.endswith("]") for one in written)


def read_label_sets(
    table: pa.Table,
    features: Features,
    columns: Sequence[str],
    label_names: Sequence[str] | None,
) -> LabelSets:
    """Read columns of labels whole; null is not known, an empty list is no label at all.

    Args:
        table: the split.
        features: its columns' types; a class feature brings its names.
        columns: one of lists, or several of 0 and 1.
        label_names: the user's names in class-id order, if any were given.

    Raises:
        UserError: if they hold something else, or a label outside `label_names`.
    """
    if len(columns) > 1:
        return _of_columns(table, columns)
    column = columns[0]
    if not are_sets(table, columns):
        shown = next((one for one in table.column(column).to_pylist() if one is not None), None)
        raise UserError(
            f"the label column {column!r} holds one label a document (such as {shown!r}), and a "
            'multi-label teacher has any number: write lists, as in ["a", "b"], or name one '
            "column of 0 and 1 for each label, as in --label-column a,b"
        )
    rows = [_listed(value, column) for value in table.column(column).to_pylist()]
    values, are_ordered = _values(rows, features[column], column, label_names)
    place = {value: idx for idx, value in enumerate(values)}
    has = np.zeros((len(rows), len(values)), np.int8)
    for idx, row in enumerate(rows):
        if row is None:
            has[idx] = MISSING_LABEL
            continue
        for value in row:
            if value not in place:
                raise UserError(
                    f"the label {value!r} in column {column!r} is not among the label names "
                    f"({', '.join(map(str, values))}): add it to --label-names"
                )
            has[idx, place[value]] = 1
    return LabelSets(has, values, are_ordered=are_ordered)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in tests)


def _listed(value: Any, column: str) -> list[Any] | None:
    """A document's labels; None where it is not known."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError:
            value = _in_single_quotes(value)
    if value is None:
        return None
    if not isinstance(value, list) or any(isinstance(one, list | dict | float) for one in value):
        shown = str(value)[:_NUM_SHOWN]
        raise UserError(
            f"the label column {column!r} holds {shown!r}, expected a list of names or integers, "
            'as in ["a", "b"]'
        )
    return value


def _in_single_quotes(value: str) -> Any:
    """As pandas writes a list of names into a csv; else what it is."""
    try:
        return json.loads(value.replace("'", '"'))
    except ValueError:
        return value


def _values(
    rows: Sequence[list[Any] | None],
    feature: Any,
    column: str,
    label_names: Sequence[str] | None,
) -> tuple[tuple[str, ...] | tuple[int, ...], bool]:
    """All labels, and whether their order was given."""
    inner = getattr(feature, "feature", None)
    seen = {value for row in rows if row is not None for value in row}
    are_names, are_integers = (
        all(isinstance(one, kind) and not isinstance(one, bool) for one in seen)
        for kind in (str, int)
    )
    if not seen or not (are_names or are_integers):
        raise UserError(
            f"the lists of column {column!r} hold {'no label' if not seen else 'names and numbers'}"
            ", expected names, or integers: name another one with --label-column"
        )
    if isinstance(inner, ClassLabel):
        for row in rows:
            if row is not None:
                row[:] = [inner.names[one] for one in row]
        return tuple(inner.names), True
    if are_names:
        return (tuple(label_names), True) if label_names else (tuple(sorted(seen)), False)
    return tuple(sorted(seen)), False


def _of_columns(table: pa.Table, columns: Sequence[str]) -> LabelSets:
    has = np.zeros((len(table), len(columns)), np.int8)
    for idx, column in enumerate(columns):
        for number, value in enumerate(table.column(column).to_pylist()):
            written = "" if value is None else str(value).strip().lower()
            if written in ("", str(MISSING_LABEL)):
                has[number, idx] = MISSING_LABEL
            elif written in _ANSWERS:
                has[number, idx] = _ANSWERS[written]
            else:
                raise UserError(
                    f"the label column {column!r} holds {str(value)[:_NUM_SHOWN]!r}, expected 0 or "
                    "1, whether a document has that label: name other columns with --label-column"
                )
    has[(has == MISSING_LABEL).any(axis=1)] = MISSING_LABEL
    return LabelSets(has, tuple(columns), are_ordered=True, are_columns=True)


@dataclass(frozen=True)
class LabelValues:
    """The numbers of one split.

    Attributes:
        values: float64 [num_documents]; NaN where a document has none.
    """

    plural: ClassVar[str] = "numbers"

    values: np.ndarray
    names: None = None

    @property
    def is_missing(self) -> np.ndarray:
        """[num_documents] bool."""
        return np.isnan(self.values)

    def counts(self) -> dict[str, int]:
        """Numbers are not counted."""
        return {}

    def at(self, positions: np.ndarray) -> LabelValues:
        """Those of some documents."""
        return replace(self, values=self.values[positions])

    def of_document(self, idx: int) -> float | None:
        """A document's number; None where it has none."""
        value = float(self.values[idx])
        return None if np.isnan(value) else value

    def constant(self) -> str | None:
        """The number that all documents have; None where they differ."""
        known = np.unique(self.values[~self.is_missing])
        return f"{known[0]:g}" if len(known) == 1 else None

    def class_names(self) -> tuple[str, ...]:
        """The one name that transformers gives a number, to fine-tune a new teacher with.

        Raises:
            UserError: if a document has none.
        """
        if self.is_missing.any():
            raise UserError(
                f"{int(self.is_missing.sum()):,} documents have no number, and a teacher needs "
                "labelled text: leave them out with --missing-labels drop"
            )
        return ("LABEL_0",)

    def of_classes(
        self,
        teacher_id2label: Mapping[int, str],
        explicit: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> tuple[LabelValues, dict[str | int, int]]:
        """The same: a number means no class.

        Raises:
            UserError: for names of classes.
        """
        if explicit or label_map:
            flag = "--label-map" if label_map else "--label-names"
            raise UserError(f"{flag} is of classes, and this teacher gives a number: leave it out")
        return self, {}

    def described(self, class_ids: Mapping[str | int, int], counts: Mapping[str, int]) -> str:
        """Their range and mean."""
        known = self.values[~self.is_missing]
        if not len(known):
            return "no numbers"
        return f"numbers from {known.min():g} to {known.max():g}, {known.mean():.4g} in the mean"


def are_fractions(table: pa.Table, columns: Sequence[str]) -> bool:
    """Whether a column holds numbers, and not all of them are integers."""
    numbers = _numbers(table.column(columns[0]))
    return numbers is not None and bool((np.floor(numbers) != numbers)[~np.isnan(numbers)].any())


def read_label_values(table: pa.Table, features: Features, columns: Sequence[str]) -> LabelValues:
    """Read a column of numbers whole; null, an empty text and NaN are none.

    Raises:
        UserError: if it holds something else.
    """
    if len(columns) > 1:
        raise UserError(
            f"--label-column {','.join(columns)} names {len(columns)} columns, and this teacher "
            "gives one number: name one column"
        )
    column = columns[0]
    values = table.column(column)
    numbers = None if isinstance(features[column], ClassLabel) else _numbers(values)
    if numbers is None:
        shown = next((one for one in values.to_pylist() if one is not None), None)
        raise UserError(
            f"the label column {column!r} holds {values.type} such as {shown!r}, and this teacher "
            "gives a number: name a column of numbers with --label-column"
        )
    if np.isinf(numbers).any():
        raise UserError(f"the label column {column!r} holds an infinite number: leave it out")
    return LabelValues(numbers)


def _numbers(values: pa.ChunkedArray) -> np.ndarray | None:
    """As float64 with NaN for none; None where they are no numbers."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        written = [(one or "").strip() for one in values.to_pylist()]
        try:
            return np.array([np.nan if w.lower() in _NOTHING else float(w) for w in written])
        except ValueError:
            return None
    is_number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in is_number):
        return None
    numbers = pc.fill_null(pc.cast(values, pa.float64()), np.nan)
    return numbers.to_numpy().astype(np.float64)
