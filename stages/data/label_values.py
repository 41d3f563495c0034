"""Labels that are numbers, of which a teacher says one a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features

from teacher_cache.cache.errors import UserError

_NOTHING = {"", "nan", "<na>", "none", "null", "na", "n/a"}


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
