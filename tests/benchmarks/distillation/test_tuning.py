from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.distillation import tuning
from benchmarks.distillation.rows import ROWS, Row, Settings
from benchmarks.distillation.scale import FULL, Scale
from teacher_cache.cache.errors import UserError

ROW = Row(
    name="logits", title="+ logits", block="main", overrides={"alpha": 0.9},
    trials=({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}),
)  # fmt: skip


def tuned(row: Row, chosen: int, scale: Scale = FULL) -> dict[str, dict[str, Any]]:
    trials = [{"settings": dict(trial), "accuracy": 0.5, "nll": 1.0} for trial in row.trials]
    recipe = tuning.recipe(row, scale)
    return {row.key: {"recipe": recipe, "trials": trials, "chosen": trials[chosen]["settings"]}}


def chosen(file: Path, row: Row, scale: Scale = FULL) -> Settings:
    return tuning.chosen(file, row, scale, rows=ROWS, command="python -m benchmarks.quality")


def test_the_most_accurate_trial_then_the_likeliest() -> None:
    trials = [
        {"accuracy": 0.7, "nll": 0.5},
        {"accuracy": 0.8, "nll": 0.9},
        {"accuracy": 0.8, "nll": 0.6},
        {"accuracy": 0.8, "nll": 0.7},
    ]
    assert tuning.best(trials) == trials[2]


def test_the_choice_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "results" / "tuning.json"
    tuning.record(file, tuned(ROW, 1), {"cores": 2}, seed=0)
    assert chosen(file, ROW) == {"lr": 0.2}


def test_rows_are_tuned_in_parts(tmp_path: Path) -> None:
    file, other = tmp_path / "tuning.json", replace(ROW, name="all")
    tuning.record(file, tuned(ROW, 0), {}, seed=0)
    tuning.record(file, tuned(other, 1), {}, seed=0)
    tuning.record(file, tuned(other, 2), {}, seed=0)
    assert chosen(file, ROW) == {"lr": 0.1}
    assert chosen(file, other) == {"lr": 0.3}
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_nothing_to_choose_needs_no_file(tmp_path: Path) -> None:
    assert chosen(tmp_path / "none", replace(ROW, trials=())) == {}
    assert chosen(tmp_path / "none", replace(ROW, trials=({"lr": 1},))) == {"lr": 1}


@pytest.mark.parametrize(
    ("row", "scale"),
    [
        (replace(ROW, overrides={"alpha": 0.8}), FULL),
        (replace(ROW, trials=ROW.trials[:2]), FULL),
        (ROW, replace(FULL, student=FULL.student | {"num_layers": 9})),
        (ROW, replace(FULL, tuning_steps=9)),
        (ROW, replace(FULL, teachers=FULL.teachers | {"main": {"epochs": 1}})),
    ],
)
def test_another_recipe_is_tuned_again(tmp_path: Path, row: Row, scale: Scale) -> None:
    file = tmp_path / "tuning.json"
    tuning.record(file, tuned(ROW, 1), {}, seed=0)
    with pytest.raises(
        UserError,
        match=r"another recipe than .*`python -m benchmarks\.quality --tune --rows logits` first",
    ):
        chosen(file, row, scale)


def test_a_scarce_row_takes_the_choice_of_the_main_one(tmp_path: Path) -> None:
    file, scarce = tmp_path / "tuning.json", next(row for row in ROWS if row.key == "scarce/all")
    main = next(row for row in ROWS if row.key == "main/all")
    tuning.record(file, tuned(main, 1), {}, seed=0)
    assert chosen(file, scarce) == main.trials[1]


def test_views_count_where_they_take_part(tmp_path: Path) -> None:
    file, more = tmp_path / "tuning.json", replace(FULL, tuning_views=FULL.tuning_views + 1)
    row = replace(ROW, name="views", overrides={"unlabeled_alpha": 0.3})
    tuning.record(file, tuned(ROW, 1) | tuned(row, 1), {}, seed=0)
    assert chosen(file, ROW, more) == {"lr": 0.2}
    with pytest.raises(UserError, match="with another recipe"):
        chosen(file, row, more)


def test_a_row_that_was_not_tuned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no choice for the row main/logits, which has 3 trials"):
        chosen(tmp_path / "tuning.json", ROW)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text("{}")
    with pytest.raises(UserError, match=r"is damaged .* remove it and tune again"):
        chosen(tmp_path / "tuning.json", ROW)
