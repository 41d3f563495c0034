"""All that one run of the codecs' table found: printed, and kept as JSON and markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.codec_table.held_out import Figures
from benchmarks.codec_table.kept import Kept
from benchmarks.codec_table.results import Difference, Result
from benchmarks.codec_table.rows import BASELINE, MIXED, ROWS
from benchmarks.distillation.tables import NONE, Grid, goal_grid
from benchmarks.goal import Goal
from teacher_cache.cache.commit import write_bytes_atomically

JSON_NAME, MARKDOWN_NAME = "codecs.json", "codecs.md"
COMMAND = "python -m benchmarks.codecs"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One run's figures.

    Attributes:
        machine: that it ran on, and the versions of the libraries.
        settings: the scale, with the recipes of teacher and students.
        teacher: what is known of the table's own: its training, and its held-out figures.
        judged: its figures on the held-out chapters.
        results: of all rows.
        kept: what each distilled row keeps of the table's own teacher.
        large: the same of SmolLM2; None where it was left out.
        goals: with their verdicts.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    teacher: dict[str, Any]
    judged: Figures
    results: Sequence[Result]
    kept: Mapping[str, Kept]
    large: Mapping[str, Kept] | None
    goals: Sequence[Goal]

    def grids(self) -> Iterator[Grid]:
        """Every table, in the order of reading."""
        alone = [one for one in self.results if one.alpha in (0.0, 1.0)]
        mixed = [one for one in self.results if one.alpha not in (0.0, 1.0)]
        yield _quality_grid("what students learn from the distillation term alone", alone, self)
        if mixed:
            yield _quality_grid("half of the weight on the next tokens", mixed, self)
        yield kept_grid("what a codec keeps of the table's own teacher", self.kept)
        if self.large is not None:
            yield kept_grid("what a codec keeps of SmolLM2-135M", self.large)
        yield goal_grid(self.goals)

    def show(self, console: Console) -> None:
        """Print every table."""
        for grid in self.grids():
            console.print(grid.rich())

    def write(self, folder: Path) -> None:
        """Write `codecs.json` and `codecs.md`."""
        described = "; ".join(f"{name} {value}" for name, value in self.machine.items() if value)
        grids = "\n".join(grid.markdown() for grid in self.grids())
        intro = f"What `{COMMAND}` measured ({described}).\n"
        write_bytes_atomically(folder / MARKDOWN_NAME, f"{intro}\n{grids}".encode())
        text = json.dumps(finite(self._as_json()), indent=1, allow_nan=False) + "\n"
        write_bytes_atomically(folder / JSON_NAME, text.encode())

    def _as_json(self) -> dict[str, Any]:
        large = self.large
        return {
            "machine": self.machine,
            "settings": self.settings,
            "teacher": self.teacher | {"held_out": asdict(self.judged)},
            "results": [asdict(one) for one in self.results],
            "kept": _kept_as_json(self.kept),
            "smollm2": None if large is None else _kept_as_json(large),
            "goals": [asdict(one) | {"verdict": one.verdict} for one in self.goals],
        }


def _kept_as_json(kept: Mapping[str, Kept]) -> dict[str, Any]:
    """Every figure; of the row that reads nothing of a teacher, its gradient's alone."""
    found = {name: asdict(one) for name, one in kept.items()}
    if BASELINE in found:
        found[BASELINE] = {"angles": found[BASELINE]["angles"]}
    return found


def finite(value: Any) -> Any:
    """The same with infinite numbers as words, since JSON has none."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _quality_grid(title: str, found: Sequence[Result], findings: Findings) -> Grid:
    columns: dict[str, Callable[[Result], str]] = {
        "bytes a token": lambda one: _bytes(one.name, findings.kept),
        "CE": lambda one: _with_spread(one.mean.ce, one.spread),
        "CE above none": lambda one: _difference(one.to_baseline),
        "CE above dense": lambda one: _difference(one.to_dense),
        "KL to teacher": lambda one: f"{one.mean.kl:.3f}",
        "ECE %": lambda one: f"{100 * one.mean.ece:.1f}",
        "next token right %": lambda one: f"{100 * one.mean.accuracy:.1f}",
    }
    judged = findings.judged
    teacher = ("teacher", NONE, f"{judged.ce:.3f}", NONE, NONE, "0", f"{100 * judged.ece:.1f}")
    return Grid(
        title=title,
        headings=("learned from", *columns),
        lines=(
            (*teacher, f"{100 * judged.accuracy:.1f}"),
            *((one.title, *(cell(one) for cell in columns.values())) for one in found),
        ),
        note=f"On chapters of a novel that nobody learned from. {_seeds(found[0].seeds)} KL: over "
        "the teacher's whole distribution.",
    )


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"One seed, {seeds[0]}: what is noise cannot be told."
    return (
        f"Mean over {len(seeds)} seeds ± their standard deviation; differences are taken seed by "
        "seed, with 95 % intervals of Student's t, and one that holds 0 is marked ~."
    )


def kept_grid(title: str, kept: Mapping[str, Kept]) -> Grid:
    """What each codec stores and loses, and where its gradient points."""
    some = next(iter(kept.values())).angles
    titles = {row.name: row.title for row in ROWS}
    return Grid(
        title=title,
        headings=(
            "kept",
            "bytes a token",
            "ids",
            "mass outside %",
            "reconstruction KL",
            "angle of a step °",
            f"angle of {some.num_steps} steps °",
            "length",
        ),
        lines=tuple(
            (
                titles[name],
                *_losses(name, kept),
                f"{one.angles.step:.1f}",
                f"{one.angles.all_steps:.1f}",
                f"{one.angles.norm:.2f}",
            )
            for name, one in kept.items()
        ),
        note="Bytes: with 7 for the token itself, its segment and its mask. Mass outside: the "
        "teacher's, of what is not stored id by id. Reconstruction KL: from the teacher to what is "
        "decoded, over the stored ids and the ghost. Angle: between the gradients of a row's loss "
        "and the dense one's by all parameters of a student of next tokens alone, of the same "
        f"step of {some.positions:,.0f} positions, and of the sum over {some.num_steps} steps; "
        "length: of that sum, as a multiple of the dense one's.",
    )


def _losses(name: str, kept: Mapping[str, Kept]) -> tuple[str, str, str, str]:
    """Bytes, ids, mass outside them and KL; nothing of the row that reads nothing of a teacher."""
    one = kept[name]
    if name == BASELINE:
        return NONE, NONE, NONE, NONE
    kl = f"{one.kl:.1e}" if math.isfinite(one.kl) else "infinite"
    return _bytes(name, kept), f"{one.num_ids:,.1f}", f"{100 * one.mass_outside:.1f}", kl


def _bytes(name: str, kept: Mapping[str, Kept]) -> str:
    """Of a row, whatever the weights of its terms."""
    one = kept.get(name.removesuffix(MIXED))
    return NONE if one is None or name == BASELINE else f"{one.bytes_per_token:,.0f}"


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return NONE
    if found.margin is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ± {found.margin:.3f}{' ~' if found.is_noise else ''}"
