"""The codecs benchmark through its command line; the figures of a tiny run mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from benchmarks import codecs
from benchmarks.codec_table.rows import DISTILLED, NONE, ROWS, TINY

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


def run(folder: Path, *options: str) -> str:
    """Run it to its end, which must be a good one; returns what it printed."""
    places = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    command = [sys.executable, "-m", "benchmarks.codecs", "--tiny", *places, *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_part_and_then_the_whole_benchmark_tiny(tmp_path: Path, austen_dir: Path) -> None:
    printed = run(tmp_path, "--rows", "none,sampled-50", "--seeds", "1")
    assert "only a part of the table: nothing was written" in printed
    (done,) = (tmp_path / "work" / "runs").glob("*sampled*/model.safetensors")
    written = done.stat().st_mtime_ns

    run(tmp_path)
    assert done.stat().st_mtime_ns == written, "what was trained before is found again"
    found = json.loads((tmp_path / "results" / "codecs.json").read_text())
    assert [one["name"] for one in found["results"]] == [row.name for row in ROWS]
    assert {len(one["each"]) for one in found["results"]} == {len(TINY.seeds)}
    # Draws depend on the sample alone and steps on the seed: two codecs that keep all agree.
    dense, hidden = (
        next(one for one in found["results"] if one["name"] == name) for name in ("dense", "hidden")
    )
    assert hidden["mean"]["ce"] == pytest.approx(dense["mean"]["ce"], abs=1e-3)
    assert set(found["kept"]) == {row.name for row in (NONE, *DISTILLED)}
    assert found["kept"]["naive-12"]["kl"] == "inf"
    assert found["smollm2"] is None
    assert {goal["verdict"] for goal in found["goals"]} == {"other sizes"}
    table = (tmp_path / "results" / "codecs.md").read_text()
    for row in ROWS:
        assert f"| {row.title} |" in table


def test_a_tiny_run_leaves_the_kept_results_alone() -> None:
    with pytest.raises(typer.BadParameter, match="--tiny measures nothing to keep"):
        codecs.main(tiny=True)


def test_rows_are_chosen_by_name_in_the_table_s_order() -> None:
    assert [row.name for row in codecs.choose_rows("sampled-50, none")] == ["none", "sampled-50"]
    assert codecs.choose_rows("") == ROWS
    with pytest.raises(typer.BadParameter, match="sampled-50"):
        codecs.choose_rows("sampled-5")
