"""The benchmarks' own arithmetic, and one tiny run; no time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from benchmarks import report, scan
from benchmarks.backbones import BACKBONES, without_kernels
from benchmarks.goals import goals
from benchmarks.timing import (
    Cell,
    Shape,
    affordable_repeats,
    growth_exponent,
    interleaved,
    predicted,
)

AT_512 = Shape(512, batch=8)


def cell(name: str, shape: Shape, seconds: float, peak: int = 1_000_000) -> Cell:
    return Cell(name, shape, times_s=(seconds,) * 3, peak_bytes=peak)


def test_exponent_of_exact_powers() -> None:
    for exponent in (0.5, 1.0, 2.0):
        costs = {length: 3e-5 * length**exponent for length in (1024, 2048, 8192)}
        assert growth_exponent(costs) == pytest.approx(exponent)


def test_exponent_looks_at_long_sequences_only() -> None:
    costs = {128: 7.0, 1024: 1.0, 2048: 2.0, 4096: 4.0}
    assert growth_exponent(costs, from_length=1024) == pytest.approx(1)
    assert growth_exponent(costs, from_length=4096) is None


def test_prediction_follows_the_growth_so_far() -> None:
    quadratic = {Shape(128, 1): 1.0, Shape(256, 1): 4.0}
    assert predicted(quadratic, Shape(512, 1)) == pytest.approx(16)
    assert predicted(quadratic, Shape(2048, 1)) == pytest.approx(256)
    assert predicted(quadratic, Shape(256, 8)) == pytest.approx(32)
    flat = {Shape(128, 1): 1.0, Shape(256, 1): 1.0}
    assert predicted(flat, Shape(512, 1)) == pytest.approx(2), "at least linear"
    assert predicted({Shape(128, 1): 1.0}, Shape(512, 1)) == pytest.approx(4)
    assert predicted({}, Shape(512, 1)) == 0


def test_budget() -> None:
    assert affordable_repeats(0.01, 100, most=5) == 5
    assert affordable_repeats(12.5, 100, most=5) == 4, "half of what is left"
    assert affordable_repeats(51, 100, most=5) == 1
    assert affordable_repeats(100, 100, most=5) == 1
    assert affordable_repeats(101, 100, most=5) == 0
    assert affordable_repeats(0, 100, most=5) == 5


def test_repeats_are_interleaved() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    times = interleaved({name: lambda name=name: run(name) for name in "abc"}, dict(a=3, b=1, c=2))
    assert "".join(order) == "abcaca"
    assert times == {"a": (1, 4, 6), "b": (2,), "c": (3, 5)}


def test_goals_are_computed() -> None:
    cells = [
        cell("encoder", AT_512, 1.0),
        cell("mamba", AT_512, 4.0),
        cell("mamba2", AT_512, 2.5),
        cell("hf-mambapy", AT_512, 19.0),
        *(cell("mamba", Shape(n, 1), n**1.1, n * 1000) for n in (1024, 2048, 8192)),
        *(cell("mamba2", Shape(n, 1), n, n) for n in (1024, 4096)),
    ]
    found = goals(cells, AT_512, batch=1, standard=True)
    assert [goal.verdict for goal in found] == [
        *("met", "missed", "missed", "missed", "met", "other sizes", "other sizes")
    ]
    assert [goal.value for goal in found[:3]] == pytest.approx([4, 2.5, 4.75])
    assert [goal.value for goal in found[3:5]] == pytest.approx([1.1, 1.0])
    assert "to 8,192" in found[3].what and "to 4,096" in found[5].what
    elsewhere = goals(cells, AT_512, batch=1, standard=False)
    assert {goal.verdict for goal in elsewhere} == {"other sizes"}
    alone = goals(cells[:1], AT_512, batch=1, standard=True)
    assert {goal.verdict for goal in alone} == {"not measured"}


def test_table_says_what_was_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(128, batch=1)
    cells = [
        cell("encoder", shape, 0.5),
        cell("mamba", shape, 1.25, peak=3_000_000),
        Cell("hf-mamba", shape, not_run="would take about 900 s a run"),
    ]
    names = ("encoder", "mamba", "hf-mamba")
    for table in (report.time_table, report.memory_table):
        Console(width=100).print(table(cells, names, batch=1))
    printed = capsys.readouterr().out
    for part in ("0.500 s", "1.25 s", "2.50×", "3.0 MB", "3.00×"):
        assert part in printed
    assert printed.count("not run") == 2


def test_kernels_are_hidden_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = type(sys)("mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm", stand_in)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    with without_kernels(), pytest.raises(ImportError):
        import mamba_ssm  # pyright: ignore[reportMissingImports]  # noqa: F401
    assert sys.modules["mamba_ssm"] is stand_in
    assert "causal_conv1d" not in sys.modules


def tiny_run(tmp_path: Path, **options: Any) -> dict[str, Any]:
    found = tmp_path / "scan.json"
    tiny: dict[str, Any] = {"width": 32, "layers": 1, "lengths": "8,16", "repeats": 1}
    tiny |= {"goal_batch": 2, "goal_length": 16, "json_out": found}
    scan.main(**tiny | options)
    return json.loads(found.read_text())


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tiny_run(tmp_path)
    assert len(found["cells"]) == 3 * len(BACKBONES)
    for one in found["cells"]:
        if BACKBONES[one["backbone"]].missing:
            assert "not installed" in one["not_run"]
        else:
            assert one["not_run"] is None
            assert len(one["times_s"]) == 1
    assert {goal["verdict"] for goal in found["goals"]} <= {"other sizes", "not measured"}
    printed = capsys.readouterr().out
    for backbone in BACKBONES.values():
        assert backbone.about in printed


def test_what_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tiny_run(tmp_path, only="mamba", budget_s=0.0)
    assert {one["backbone"] for one in found["cells"]} == {"encoder", "mamba"}
    printed = capsys.readouterr().out
    for one in found["cells"]:
        assert one["not_run"] and not one["times_s"]
        shape = Shape(**one["shape"])
        assert f"{BACKBONES[one['backbone']].title} at {shape}: not run: " in printed
    assert "stopped after 0 s" in printed


@pytest.mark.parametrize(
    "options",
    [{"width": 48}, {"lengths": "8,x"}, {"only": "mamba3"}, {"device": "tpu"}],
)
def test_refuses_what_it_cannot_mean(tmp_path: Path, options) -> None:
    with pytest.raises(typer.BadParameter):
        tiny_run(tmp_path, **options)
