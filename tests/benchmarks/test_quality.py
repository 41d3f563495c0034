"""The quality benchmark through its command line; the figures of a tiny run mean nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import quality
from benchmarks.distillation.rows import ROWS, USUAL_BLOCKS
from benchmarks.distillation.scale import TINY

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


class Folders:
    """Where one test's runs go."""

    def __init__(self, folder: Path):
        self.work, self.results = folder / "work", folder / "results"

    def command(self, *options: str) -> list[str]:
        places = ["--work", str(self.work), "--results", str(self.results)]
        return [sys.executable, "-m", "benchmarks.quality", "--tiny", *places, *options]


@pytest.fixture
def folders(tmp_path: Path, assets: Path) -> Folders:
    return Folders(tmp_path)


def done(command: list[str]) -> str:
    """Run it to its end, which must be a good one; returns what it printed."""
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(command: list[str], *, at: str, by: signal.Signals) -> tuple[int, str]:
    """Stop it where it prints `at`, as Ctrl-C does or by killing it; returns code and stderr.

    No process that it started is left.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As a terminal starts it: a shell's background job, such as a CI's, ignores Ctrl-C, and so
        # would all that it starts.
        preexec_fn=_heed_interrupts,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(at):
                break
        else:
            pytest.fail(f"it ended before it printed {at!r}: {process.communicate()}")
        if by is signal.SIGINT:
            os.killpg(process.pid, by)  # a terminal sends it to all
        else:
            process.send_signal(by)
        _, errors = process.communicate(timeout=60)
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, errors
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("its workers outlived it")


@pytest.mark.slow
def test_tuning_is_interrupted_killed_and_resumed(folders: Folders) -> None:
    # So many that a slow machine is not done before it is stopped.
    rows = ("all", "views", "logits", "labels")
    trials = len(next(row for row in ROWS if row.key == "main/all").trials)
    num_trials = trials * len(rows)
    names = ",".join((*rows, "tfidf"))
    tuning = folders.command("--tune", "--rows", names, "--blocks", "main", "--jobs", "2")
    code, errors = stopped(tuning, at="started", by=signal.SIGINT)
    assert (code, errors.splitlines()[-1]) == (130, "interrupted")
    code, _ = stopped(tuning, at=f"1 of {num_trials}: ", by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    printed = done(tuning)
    assert "was trained before" in printed and f"{num_trials} of {num_trials}: " in printed
    tuned = json.loads((folders.results / "quality-tuning.json").read_text())["rows"]
    assert set(tuned) == {f"main/{name}" for name in (*rows, "tfidf")}
    assert all(len(row["trials"]) == trials for row in tuned.values())
    assert not list(folders.work.rglob("test.jsonl")), "tuning writes nothing of a test movie"

    printed = done(folders.command("--rows", "all,tfidf,teacher", "--blocks", "main"))
    chosen = {**tuned["main/all"]["chosen"], "seed": 0}
    words = ", ".join(f"{name} {value}" for name, value in chosen.items())
    assert f"started main/all ({words})" in printed
    assert "other sizes" in printed and "nothing was written" in printed
    assert not (folders.results / "quality.json").exists()

    refused = folders.command("--rows", "pooled", "--blocks", "main")
    ended = subprocess.run(refused, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 2
    assert "has no choice for the row main/pooled" in ended.stderr


@pytest.mark.slow
def test_the_whole_benchmark_tiny(folders: Folders) -> None:
    printed = done(folders.command("--untuned"))
    assert "none of" in printed and "goals" in printed
    found = json.loads((folders.results / "quality.json").read_text())
    rows = [row for row in ROWS if row.block in USUAL_BLOCKS]
    assert [one["key"] for one in found["results"]] == [row.key for row in rows]
    for one in found["results"]:
        assert 0 <= one["mean"]["accuracy"] <= 1
        assert one["to_teacher"]["low"] <= one["to_teacher"]["high"]
    assert {goal["verdict"] for goal in found["goals"]} == {"other sizes"}
    assert not any(one["num_normalised"] for one in found["overlaps"])
    assert {len(one["texts"]) > 0 for one in found["sureness"]} == {True}
    assert found["cost"]["ms_per_review"].keys() == {"teacher", "student"}
    assert (
        found["machine"]["torch"]
        and found["settings"]["scale"]["num_test_movies"] == TINY.num_test_movies
    )
    for row in rows:
        assert f"| {row.title} |" in (folders.results / "quality.md").read_text()


def test_a_tiny_run_leaves_the_kept_results_alone() -> None:
    found = CliRunner().invoke(quality.app, ["--tiny"])
    assert found.exit_code == 2 and "--tiny measures nothing to keep" in found.output
