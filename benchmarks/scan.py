"""Time and memory of sequence backbones by length, as ratios to an encoder of the same shape.

    python -m benchmarks.scan --json benchmarks/results/scan.json

Needs mambapy for one of its columns (`pip install mambapy`). Run it on a quiet machine: the
repeats of all backbones are interleaved, which evens out slow changes only.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks import machine, memory, report
from benchmarks.backbones import BACKBONES, BASELINE, Sizes, forward_backward, random_ids
from benchmarks.goal import Goal, goal_table
from benchmarks.goals import LAYERS, WIDTH, goals
from benchmarks.timing import Cell, Shape, affordable_repeats, interleaved, predicted
from teacher_cache.cache.errors import did_you_mean

WARM_UP_BELOW_S = 1.0  # what a shape's first run does once takes milliseconds
MEMORY_SHARE = 0.7  # of what the machine could give at the start


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; the options' help says more."""

    width: int
    layers: int
    lengths: tuple[int, ...]
    batch: int
    goal_batch: int
    goal_length: int
    repeats: int
    budget_s: float
    threads: int
    device: str
    only: tuple[str, ...]


class Measurement:
    """Measures every backbone at every shape that its budget allows.

    Args:
        settings: of the run.
        console: for progress.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.device = torch.device(settings.device)
        longest = max(*settings.lengths, settings.goal_length)
        self.sizes = Sizes(settings.width, settings.layers, longest)
        self.left_s = dict.fromkeys(settings.only, settings.budget_s)
        self.seconds: dict[str, dict[Shape, float]] = {name: {} for name in settings.only}
        self.peaks: dict[str, dict[Shape, float]] = {name: {} for name in settings.only}
        self.most_bytes = MEMORY_SHARE * machine.available_bytes()
        self.models: dict[str, nn.Module] = {}

    def run(self) -> list[Cell]:
        """Measure shape by shape, shorter sequences first."""
        settings = self.settings
        shapes = {Shape(length, settings.batch) for length in settings.lengths}
        shapes.add(Shape(settings.goal_length, settings.goal_batch))
        return [cell for shape in sorted(shapes) for cell in self._measure(shape)]

    def _measure(self, shape: Shape) -> list[Cell]:
        runs: dict[str, memory.Run] = {}
        refused: dict[str, str] = {}
        repeats: dict[str, int] = {}
        for name in self.settings.only:
            try:
                runs[name], repeats[name] = self._first_run(name, shape)
            except memory.NotFinished as reason:
                refused[name] = str(reason)
        ids = random_ids(shape.batch, shape.length, self.device)
        timed = {name: partial(self._timed_run, name, ids) for name in runs}
        interleaved(timed, {name: int(run.seconds < WARM_UP_BELOW_S) for name, run in runs.items()})
        times = interleaved(timed, repeats)
        cells = [
            Cell(name, shape, not_run=refused[name])
            if name in refused
            else Cell(name, shape, times[name], runs[name].peak_bytes)
            for name in self.settings.only
        ]
        for cell in cells:
            if cell.median_s is not None:
                self.seconds[cell.backbone][shape] = cell.median_s
                self.peaks[cell.backbone][shape] = cell.peak_bytes or 0
        self.console.print(f"{shape}: {len(runs)} of {len(cells)} measured")
        return cells

    def _first_run(self, name: str, shape: Shape) -> tuple[memory.Run, int]:
        """The run that measures memory, and how often to time another.

        Raises:
            NotFinished: if it cannot run, does not fit, or did not come to its end.
        """
        if BACKBONES[name].missing:
            raise memory.NotFinished(BACKBONES[name].missing)
        left_s, seconds = self.left_s[name], predicted(self.seconds[name], shape)
        peak = predicted(self.peaks[name], shape)
        if self.device.type == "cpu" and self.most_bytes and peak > self.most_bytes:
            raise memory.NotFinished(f"would need about {peak / 1e9:,.0f} GB of memory")
        if 2 * seconds > left_s:  # one for memory, one timed
            took = f"about {seconds:,.3g} s" if seconds else "nobody knows how long"
            raise self._too_long(name, f"would take {took}")
        started = time.perf_counter()
        try:
            run = self._memory_run(name, shape)
        finally:
            self.left_s[name] -= time.perf_counter() - started
        # The run for memory asks for fresh pages all the time and may take several times as long.
        estimate_s = min(run.seconds, seconds or run.seconds)
        repeats = affordable_repeats(estimate_s, self.left_s[name], self.settings.repeats)
        if not repeats:
            raise self._too_long(name, f"would take about {estimate_s:,.3g} s")
        return run, repeats

    def _memory_run(self, name: str, shape: Shape) -> memory.Run:
        if self.device.type == "cuda":
            return memory.run_on_cuda(self._model(name), shape, self.device)
        threads, limit_s = self.settings.threads, self.left_s[name]
        return memory.run_in_child(name, self.sizes, shape, threads=threads, limit_s=limit_s)

    def _too_long(self, name: str, took: str) -> memory.NotFinished:
        left_s, budget_s = max(0.0, self.left_s[name]), self.settings.budget_s
        return memory.NotFinished(
            f"{took} a run, at least two are needed, and {left_s:,.0f} s are left of its "
            f"{budget_s:,.0f} s"
        )

    def _timed_run(self, name: str, ids: torch.Tensor) -> float:
        model = self._model(name)
        model.zero_grad(set_to_none=True)
        seconds = forward_backward(model, ids)
        self.left_s[name] -= seconds
        return seconds

    def _model(self, name: str) -> nn.Module:
        if name not in self.models:
            torch.manual_seed(0)
            self.models[name] = BACKBONES[name].build(self.sizes).to(self.device).train()
        return self.models[name]


def main(
    width: Annotated[int, typer.Option(help="Residual stream; a multiple of 32.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers of each backbone.")] = 4,
    lengths: Annotated[
        str, typer.Option(help="Lengths of the sweep.")
    ] = "128,256,512,1024,2048,4096,8192",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at each length.")] = 1,
    goal_batch: Annotated[int, typer.Option(min=1, help="Sequences for the goals' ratios.")] = 8,
    goal_length: Annotated[int, typer.Option(min=1, help="Their length.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, where time allows.")] = 5,
    budget_s: Annotated[float, typer.Option(help="Seconds that each backbone may take.")] = 200.0,
    threads: Annotated[int, typer.Option(help="0: as many as torch takes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[
        str, typer.Option(help=f"Of {', '.join(BACKBONES)}; the encoder always runs.")
    ] = ",".join(BACKBONES),
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write this file.")] = None,
) -> None:
    """Time and peak memory of forward and backward in float32, by length, and the goals."""
    if width < 32 or width % 32:
        raise typer.BadParameter(f"--width is {width}, expected a multiple of 32")
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(
        width=width,
        layers=layers,
        lengths=_lengths(lengths),
        batch=batch,
        goal_batch=goal_batch,
        goal_length=goal_length,
        repeats=repeats,
        budget_s=budget_s,
        threads=torch.get_num_threads(),
        device=_device(device),
        only=_backbones(only),
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    described = machine.describe(torch.device(settings.device))
    console.print("; ".join(f"{name} {value}" for name, value in described.items() if value))
    console.print(f"width {width}, {layers} layers, float32; threads: {settings.threads}")
    started = time.perf_counter()
    cells = Measurement(settings, console).run()
    standard = (width, layers, device) == (WIDTH, LAYERS, "cpu")
    found = goals(cells, Shape(goal_length, goal_batch), batch, standard=standard)
    _print(console, settings, cells, found)
    console.print(f"all of it: {time.perf_counter() - started:,.0f} s")
    if json_out is not None:
        results = report.as_json(described, asdict(settings), cells, settings.only, found, batch)
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(results, indent=1) + "\n")


def _print(console: Console, settings: Settings, cells: list[Cell], found: list[Goal]) -> None:
    for name in settings.only:
        console.print(f"{BACKBONES[name].title}: {BACKBONES[name].about}", highlight=False)
    console.print(report.time_table(cells, settings.only, settings.batch))
    console.print(report.memory_table(cells, settings.only, settings.batch))
    for cell in cells:
        if cell.not_run:
            title = BACKBONES[cell.backbone].title
            console.print(f"{title} at {cell.shape}: not run: {cell.not_run}", highlight=False)
        elif len(cell.times_s) < settings.repeats:
            title, num = BACKBONES[cell.backbone].title, len(cell.times_s)
            line = f"{title} at {cell.shape}: {num} of {settings.repeats} repeats fitted"
            console.print(line, highlight=False)
    console.print(goal_table(found))


def _lengths(written: str) -> tuple[int, ...]:
    words = written.split(",")
    if not all(word.strip().isdigit() and int(word) for word in words):
        raise typer.BadParameter(f"--lengths is {written!r}, expected numbers such as 128,256")
    return tuple(sorted({int(word) for word in words}))


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device is cuda, and torch sees no such device")
    return name


def _backbones(written: str) -> tuple[str, ...]:
    names = {word.strip() for word in written.split(",")} | {BASELINE}
    for name in sorted(names - set(BACKBONES)):
        raise typer.BadParameter(f"--only names {name!r}: {did_you_mean(name, BACKBONES)}")
    return tuple(name for name in BACKBONES if name in names)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
