"""Which column of a source holds the text, and which the label."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from datasets import Features

from teacher_cache.cache.errors import UserError, did_you_mean

TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "body", "comment")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target", "rating")


def find_text_column(features: Features, wanted: str | None) -> str:
    """The column to read texts from: the wanted one, or the first of the usual names.

    Raises:
        UserError: if it is not there or does not hold text; the columns there are get named.
    """
    name = _find_column(features, wanted, TEXT_COLUMNS, option="--text-column")
    column_type = features.arrow_schema.field(name).type
    if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
        raise UserError(
            f"the column {name!r} holds {column_type}, expected text: name another one with "
            f"--text-column ({_listed(features)})"
        )
    return name


def find_label_column(features: Features, wanted: str | None) -> str:
    """The column to read labels from: the wanted one, or the first of the usual names.

    Raises:
        UserError: if it is not there; the columns there are get named.
    """
    return _find_column(features, wanted, LABEL_COLUMNS, option="--label-column")


def _find_column(
    features: Features, wanted: str | None, usual: Sequence[str], *, option: str
) -> str:
    if wanted is not None:
        if wanted not in features:
            raise UserError(
                f"there is no column {wanted!r} ({_listed(features)}): "
                f"{did_you_mean(wanted, features)}"
            )
        return wanted
    by_lower_name = {name.lower(): name for name in reversed(list(features))}
    for name in usual:
        if name in by_lower_name:
            return by_lower_name[name]
    raise UserError(
        f"no column is called {', '.join(usual[:-1])} or {usual[-1]}: name the right one with "
        f"{option} ({_listed(features)})"
    )


def _listed(features: Features) -> str:
    return f"the columns are {', '.join(features)}" if features else "there are no columns"
