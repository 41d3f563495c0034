"""What each codec of a language model's cache costs, loses and teaches, side by side.

    python -m benchmarks.codecs

A small teacher is trained on four novels, stage one caches it once a codec, and stage two trains
the same student from each cache, with three seeds; a novel that nobody learned from judges them.
Whatever is made lies below the work folder and is found again, so the command may be interrupted
anywhere and run again, or run in parts. What is trained: `codec_table/rows.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.codec_table import teacher
from benchmarks.codec_table.codec_goals import goals
from benchmarks.codec_table.findings import Findings
from benchmarks.codec_table.held_out import Figures, HeldOut
from benchmarks.codec_table.kept import Kept, compared
from benchmarks.codec_table.preparation import Prepared, cached, prepare, student_config
from benchmarks.codec_table.results import Result, result
from benchmarks.codec_table.rows import (
    BASELINE,
    BEST,
    DISTILLED,
    FULL,
    NONE,
    ROWS,
    TINY,
    WITH_LABELS,
    Row,
    Scale,
    SmolLM2Scale,
)
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.run import choose_seeds
from benchmarks.smollm2 import smollm2_folder
from teacher_cache.cache.errors import did_you_mean
from teacher_cache.pipeline.reporting import quiet_libraries, reported
from teacher_cache.stages import train_student

RESULTS = Path("benchmarks/results")
WORK = Path("runs/codecs")
WIDTH = 180  # of the tables where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked for; the options' help says more.

    Attributes:
        rows: to train.
        seeds: of each row's students.
        scale: how much of everything.
        folders: of what is made.
        smollm2: whether to measure what the codecs keep of it too.
        console: for progress and tables.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    scale: Scale
    folders: Folders
    smollm2: bool
    console: Console

    @property
    def is_whole(self) -> bool:
        """Whether the published table's rows are asked for, and SmolLM2 where the scale has it."""
        has_smollm2 = self.smollm2 or self.scale.smollm2 is None
        return has_smollm2 and {NONE, *DISTILLED} <= set(self.rows)

    @property
    def is_standard(self) -> bool:
        """Whether the goals were set for a run like this."""
        return self.is_whole and self.scale == FULL

    def say(self, line: str) -> None:
        """One line of progress."""
        self.console.print(line, highlight=False, markup=False)


def measure(run: Run) -> Findings:
    """Train every row's students, judge them, and compare what the codecs keep."""
    described = machine.describe(torch.device("cpu"))
    prepared = prepare([NONE, *run.rows], run.scale, run.folders, run.console)
    held_out = HeldOut(prepared.held_out)
    figures = _students(run, prepared, held_out)
    found = _results(run, figures)
    kept = _kept(run, prepared)
    return Findings(
        machine=described,
        settings={
            "scale": asdict(run.scale),
            "seeds": run.seeds,
            "rows": [asdict(row) for row in run.rows],
        },
        teacher=json.loads((prepared.teacher / teacher.RECORD_FILE).read_text()),
        judged=held_out.of_teacher(),
        results=found,
        kept=kept,
        large=_kept_of_smollm2(run, run.scale.smollm2)
        if run.smollm2 and run.scale.smollm2
        else None,
        goals=goals(found, kept, standard=run.is_standard),
    )


def _students(run: Run, prepared: Prepared, held_out: HeldOut) -> dict[str, list[Figures]]:
    """The figures of each row's students, by the row's name, one a seed."""
    figures: dict[str, list[Figures]] = {row.name: [] for row in run.rows}
    # Seed by seed, so that an interrupted run has compared all rows on the first ones.
    for rows in ((NONE, *DISTILLED), WITH_LABELS):
        for seed, row in product(run.seeds, [one for one in run.rows if one in rows]):
            cache = prepared.caches[row.kept]
            trained = train_student.run(student_config(row, seed, cache, run.scale, run.folders))
            found = held_out.of_run(trained.run)
            figures[row.name].append(found)
            run.say(f"{row.name}, seed {seed}: CE {found.ce:.3f}, KL {found.kl:.3f}")
    return figures


def _results(run: Run, figures: Mapping[str, Sequence[Figures]]) -> list[Result]:
    return [
        result(
            row,
            run.seeds,
            figures,
            baseline=BASELINE,
            dense=BEST if row.alpha in (0.0, 1.0) else f"{BEST}-half",
        )
        for row in run.rows
    ]


def _kept(run: Run, prepared: Prepared) -> dict[str, Kept]:
    """On the validation novel, by the first student of next tokens alone."""
    config = student_config(
        NONE, run.scale.seeds[0], prepared.caches[NONE.kept], run.scale, run.folders
    )
    student = train_student.run(config).run
    run.say("comparing gradients")
    return compared(
        prepared.teacher,
        student,
        batch_size=config.training.batch_size,
        steps=run.scale.gradient_steps,
    )


def _kept_of_smollm2(run: Run, scale: SmolLM2Scale) -> dict[str, Kept]:
    """The same of SmolLM2, by a student that has read one chapter many times."""
    at = run.folders.work / "teachers" / "smollm2"
    folder = smollm2_folder(at, instead="leave it out with --no-smollm2")
    run.say("cache of SmolLM2")
    chapter = teacher.novels("train", 1)
    cache = cached(dict(NONE.codec), folder, chapter, run.folders, run.console)
    settings = run.scale.student | {"batch_size": scale.batch_size}
    smaller = replace(run.scale, student=settings, num_steps=scale.num_steps)
    student = train_student.run(student_config(NONE, 0, cache, smaller, run.folders)).run
    run.say("comparing gradients of SmolLM2")
    return compared(folder, student, batch_size=scale.gradient_batch, steps=scale.gradient_steps)


def choose_rows(names: str) -> tuple[Row, ...]:
    """The rows of these names, separated by commas; all rows for no name.

    Raises:
        BadParameter: for a name that there is not.
    """
    wanted = [word.strip() for word in names.split(",") if word.strip()]
    known = {row.name for row in ROWS}
    for one in wanted:
        if one not in known:
            raise typer.BadParameter(f"--rows names {one!r}: {did_you_mean(one, known)}")
    return tuple(row for row in ROWS if not wanted or row.name in wanted)


def main(
    rows: Annotated[str, typer.Option(help="Only these, as in none,dense.")] = "",
    seeds: Annotated[str, typer.Option(help="Of the students, as in 0,1.")] = "",
    smollm2: Annotated[
        bool, typer.Option(help="Measure what the codecs keep of SmolLM2 too (needs gguf).")
    ] = True,
    work: Annotated[Path, typer.Option(help="Teachers, caches and runs go here.")] = WORK,
    results_folder: Annotated[
        Path, typer.Option("--results", help="What was measured goes here.")
    ] = RESULTS,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Seconds only, to try it; the figures mean nothing.")
    ] = False,
) -> None:
    """What each codec of a language model's cache costs, loses and teaches."""
    if tiny and results_folder == RESULTS:
        raise typer.BadParameter("--tiny measures nothing to keep there: give another --results")
    scale = TINY if tiny else FULL
    console = Console()
    run = Run(
        rows=choose_rows(rows),
        seeds=choose_seeds(seeds) or scale.seeds,
        scale=scale,
        folders=Folders(work),
        smollm2=smollm2,
        console=console if console.is_terminal else Console(width=WIDTH),
    )
    torch.set_num_threads(threads)
    with reported():
        quiet_libraries()
        found = measure(run)
        found.show(run.console)
        if run.is_whole:
            found.write(results_folder)
            run.say(f"✓ written to {results_folder}")
        else:
            run.say(f"only a part of the table: nothing was written to {results_folder}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
