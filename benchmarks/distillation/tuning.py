"""Choose a trial for each row by the validation movies, and read the choice again at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.distillation.rows import Row, Settings
from benchmarks.distillation.scale import Scale
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError


def best(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial of the highest validation accuracy; of equal ones that of the lower NLL.

    Args:
        trials: each with `accuracy` and `nll`.
    """
    return max(trials, key=lambda trial: (trial["accuracy"], -trial["nll"]))


def tuning_scale(scale: Scale) -> Scale:
    """The scale at which trials are trained: fewer steps and views, all else the same."""
    num_steps = dict.fromkeys(scale.num_steps, scale.tuning_steps)
    views = dict.fromkeys(scale.views, scale.tuning_views)
    return replace(scale, num_steps=num_steps, views=views)


def recipe(row: Row, scale: Scale) -> dict[str, Any]:
    """All but its trials that a row's validation figures depend on, as JSON holds it."""
    found: dict[str, Any] = {"kind": row.kind}
    if row.kind == "student":
        found["student"] = {**scale.student, "max_steps": scale.tuning_steps, **row.overrides}
        found["teacher"] = scale.teachers[row.block] | {"labels": row.teacher}
        found["max_length"] = scale.max_length
        found["views"] = scale.tuning_views if row.overrides.get("unlabeled_alpha") else None
    return json.loads(json.dumps(found))


def record(
    file: Path, tuned: dict[str, dict[str, Any]], machine: dict[str, Any], seed: int
) -> None:
    """Write the rows that were tuned; other rows of the file stay.

    Args:
        file: of all tuned rows.
        tuned: by a row's key: `recipe`, `trials` with their figures, `chosen`.
        machine: that they were tuned on.
        seed: of the students.
    """
    found = _read(file)["rows"] if file.is_file() else {}
    described = {key: one | {"seed": seed, "machine": machine} for key, one in tuned.items()}
    content = {
        "chosen by": "accuracy on the validation movies, then negative log-likelihood",
        "rows": found | described,
    }
    write_bytes_atomically(file, (json.dumps(content, indent=1) + "\n").encode())


def chosen(file: Path, row: Row, scale: Scale, *, rows: Sequence[Row], command: str) -> Settings:
    """What tuning chose for a row, or for the one whose choice it takes; or its only trial.

    Args:
        file: as `record` writes it.
        row: whose choice is wanted.
        scale: at which it was to be tuned.
        rows: the table's, among which is the one whose choice it takes.
        command: that tunes, for a message.

    Raises:
        UserError: if the row was not tuned, or its recipe or trials were others then.
    """
    if len(row.trials) < 2:
        return row.trials[0] if row.trials else {}
    row = next((one for one in rows if one.key == row.tuned_as), row)
    again = f"run `{command} --tune --rows {row.name}` first, or give --untuned"
    tuned = _read(file)["rows"].get(row.key) if file.is_file() else None
    if tuned is None:
        raise UserError(
            f"{file} has no choice for the row {row.key}, which has {len(row.trials)} trials: "
            f"{again}"
        )
    trials = [trial["settings"] for trial in tuned["trials"]]
    if trials != [dict(trial) for trial in row.trials] or tuned["recipe"] != recipe(row, scale):
        raise UserError(
            f"{file} chose for the row {row.key} among other trials or with another recipe than "
            f"there is now: {again}"
        )
    return tuned["chosen"]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        found["rows"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it and tune again") from error
    return found
