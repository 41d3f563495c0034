"""The transfer benchmark through its command line; the figures of a tiny run mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import transfer
from benchmarks.distillation.transfer_rows import FULL, MAIN_ROWS, ROWS, TINY
from teacher_cache.stages.training.config import ArchitectureConfig

ROOT = Path(__file__).parents[2]


def test_students_differ_by_what_they_learn_from_alone() -> None:
    compared = {*ArchitectureConfig.model_fields, "max_steps", "epochs", "batch_size"}
    for row in MAIN_ROWS:
        assert len(row.trials) == 2 and row.overrides == MAIN_ROWS[0].overrides
        assert not any(compared & trial.keys() for trial in row.trials)
    for scale in (FULL, TINY):
        assert not any(scale.views.values()) and scale.captured["attention"] == "mean"


def test_a_block_that_the_table_has_not() -> None:
    found = CliRunner().invoke(transfer.app, ["--blocks", "long"])
    assert (
        found.exit_code == 2 and "--blocks names 'long': choose from main, scarce" in found.output
    )


@pytest.mark.slow
def test_the_whole_benchmark_tiny(tmp_path: Path, assets: Path) -> None:
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "benchmarks.transfer", "--tiny", *places]
    for asked in (["--tune"], []):
        ended = subprocess.run(
            [*command, *asked], cwd=ROOT, capture_output=True, text=True, timeout=900
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "results" / "transfer.json").read_text())
    assert [one["key"] for one in found["results"]] == [row.key for row in ROWS]
    students = [row.key for row in ROWS if row.kind == "student"]
    assert [one["key"] for one in found["inside"]] == students
    for one in found["inside"]:
        assert min(one["map_kl"]) > 0 and 0 < min(one["hidden"]) <= max(one["hidden"]) < 2
    assert {goal["verdict"] for goal in found["goals"]} == {"other sizes"}
    text = (tmp_path / "results" / "transfer.md").read_text()
    assert "points above logits alone" in text and "any row spread evenly" in text
