"""The recipe is one that the product takes, and compares like with like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import typer

from benchmarks.distillation.folders import Folders
from benchmarks.distillation.rows import BLOCKS, ROWS, STUDENT
from benchmarks.distillation.run import choose_rows, choose_seeds
from benchmarks.distillation.scale import FULL, TINY, Scale
from benchmarks.distillation.training import cache_config, student_config, teacher_config
from teacher_cache.stages.training.config import ArchitectureConfig

COMPARED = {*ArchitectureConfig.model_fields, "max_steps", "epochs", "batch_size"}
STUDENTS = [row for row in ROWS if row.kind == "student"]


@pytest.mark.parametrize("scale", [FULL, TINY], ids=["full", "tiny"])
def test_the_product_takes_every_setting(scale: Scale, assets: Path) -> None:
    folders = Folders(Path("work"))
    teacher = teacher_config("full", folders, scale)
    out = teacher.training.out
    assert out is not None and teacher.training.eval_fraction == 0
    cache = cache_config("full", out, folders, scale)
    shards = cache.shards
    assert shards.out is not None
    assert (cache.layers.hidden, shards.views) == ("pooled", scale.views["main"])
    for row in STUDENTS:
        for trial in row.trials:
            student_config(row, trial, 0, shards.out, folders, scale)


def test_students_differ_by_what_they_learn_from_alone() -> None:
    for row in STUDENTS:
        for settings in (row.overrides, *row.trials):
            assert not COMPARED & settings.keys(), f"{row.key}: of STUDENT, for all alike"
    assert STUDENT["eval_fraction"] == 0


def test_every_row_has_as_many_trials() -> None:
    numbers = {len(row.trials) for row in ROWS if row.kind in ("student", "tfidf")}
    assert len(numbers) == 1
    for row in ROWS:
        assert all(row.trials.count(trial) == 1 for trial in row.trials)


def test_names_are_unique_in_their_block() -> None:
    assert set(Counter(row.key for row in ROWS).values()) == {1}
    for block in BLOCKS:
        rows = [row for row in ROWS if row.block == block]
        assert sum(row.is_baseline for row in rows) == (4 if block == "main" else 2)
        assert {"teacher", "views" if block == "long" else "all"} <= {row.name for row in rows}


def test_a_run_is_called_by_its_settings(tmp_path: Path) -> None:
    by_name = {row.name: row for row in ROWS if row.block == "main"}
    folders, cache = Folders(tmp_path), tmp_path / "caches" / "c"

    def out(name: str, seed: int = 0, trial: int = 0, cache: Path = cache) -> Path | None:
        row = by_name[name]
        return student_config(row, row.trials[trial], seed, cache, folders, FULL).training.out

    assert out("logits") == out("logits")
    several = [out("logits"), out("logits", seed=1), out("logits", trial=1), out("labels")]
    several.append(out("logits", cache=tmp_path / "caches" / "d"))
    assert len(set(several)) == len(several)


def test_rows_are_chosen_by_name() -> None:
    assert choose_rows(ROWS, "", ",".join(BLOCKS)) == ROWS
    assert [row.key for row in choose_rows(ROWS, "all, logits", "main,scarce")] == [
        *("main/logits", "main/all", "scarce/logits", "scarce/all")
    ]
    assert {row.block for row in choose_rows(ROWS, "", "scarce")} == {"scarce"}
    assert choose_seeds("2, 0,2") == (2, 0) and choose_seeds("") == ()


@pytest.mark.parametrize(
    ("names", "blocks", "saying"),
    [
        ("logit", "main", r"--rows names 'logit': did you mean 'logits'\?"),
        ("confidence", "scarce", "--rows names 'confidence'"),
        ("", "mian", r"--blocks names 'mian': did you mean 'main'\?"),
    ],
)
def test_a_name_that_there_is_not(names: str, blocks: str, saying: str) -> None:
    with pytest.raises(typer.BadParameter, match=saying):
        choose_rows(ROWS, names, blocks)


def test_a_seed_that_is_no_number() -> None:
    with pytest.raises(typer.BadParameter, match="--seeds is '0,x', expected numbers"):
        choose_seeds("0,x")
