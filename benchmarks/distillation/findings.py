"""All that one run of a benchmark of reviews found: printed, and kept as JSON and markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.distillation import tables
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.inside import Inside
from benchmarks.distillation.leakage import Overlap
from benchmarks.distillation.results import Result
from benchmarks.distillation.tables import Grid
from benchmarks.distillation.teachers import Sureness
from benchmarks.goal import Goal
from teacher_cache.cache.commit import write_bytes_atomically


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One run's figures.

    Attributes:
        command: that found them.
        machine: that it ran on, and the versions of the libraries.
        settings: scale, recipe and where the choice of trials is from.
        titles: of the blocks that were run.
        baseline: what the rows that the others are compared with learn from.
        results: of all rows.
        sureness: of the teachers.
        inside: distances of each row's students to their teacher's inside, where measured.
        cost: CPU time of teacher and student, where both were run.
        overlaps: of texts that are learned from with those that judge.
        goals: with their verdicts.
    """

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    titles: dict[str, str]
    baseline: str
    results: Sequence[Result]
    sureness: Sequence[Sureness]
    inside: Sequence[Inside]
    cost: Cost | None
    overlaps: Sequence[Overlap]
    goals: Sequence[Goal]

    def grids(self) -> Iterator[Grid]:
        """Every table, in the order of reading."""
        for block, title in self.titles.items():
            found = [one for one in self.results if one.block == block]
            yield tables.quality_grid(title, found)
            yield tables.comparison_grid(f"differences, {title}", found, self.baseline)
            inside = [one for one in self.inside if one.block == block]
            if inside:
                yield tables.inside_grid(f"inside, {title}", inside)
        yield tables.sureness_grid(self.sureness)
        if self.cost is not None:
            yield tables.cost_grid(self.cost)
        yield tables.overlap_grid(self.overlaps)
        yield tables.choice_grid(self.results, self.settings["trials"])
        yield tables.goal_grid(self.goals)

    def show(self, console: Console) -> None:
        """Print every table."""
        for grid in self.grids():
            console.print(grid.rich())

    def write(self, folder: Path, name: str) -> None:
        """Write `name.json` and `name.md`."""
        described = "; ".join(f"{name} {value}" for name, value in self.machine.items() if value)
        grids = "\n".join(grid.markdown() for grid in self.grids())
        intro = f"What `{self.command}` measured ({described}).\n"
        _write(folder / f"{name}.md", f"{intro}\n{grids}")
        _write(folder / f"{name}.json", json.dumps(self._as_json(), indent=1) + "\n")

    def _as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": self.settings,
            "blocks": self.titles,
            "results": [asdict(one) for one in self.results],
            "sureness": [asdict(one) for one in self.sureness],
            "inside": [asdict(one) for one in self.inside],
            "cost": None if self.cost is None else asdict(self.cost),
            "overlaps": [asdict(one) for one in self.overlaps],
            "goals": [asdict(one) | {"verdict": one.verdict} for one in self.goals],
        }


def _write(path: Path, text: str) -> None:
    write_bytes_atomically(path, text.encode())
