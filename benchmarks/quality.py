"""What each ingredient of distillation gives a small Mamba student, on real movie reviews.

    python -m benchmarks.quality --tune    # each row's trials, judged by the validation movies
    python -m benchmarks.quality           # the rows as tuned, judged by the test movies

Whatever is trained lies below the work folder and is found again, so either command may be
interrupted anywhere and run again, or run in parts. What is trained: `distillation/rows.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.distillation import cost, predictions, teachers, tuning
from benchmarks.distillation.answers import Students, baseline_answers, teacher_logits
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.findings import Findings
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.jobs import run_jobs
from benchmarks.distillation.preparation import Prepared, prepare
from benchmarks.distillation.quality_goals import goals
from benchmarks.distillation.results import Answers, Result, figures, results
from benchmarks.distillation.rows import BLOCKS, FULL, ROWS, TINY, Row, Scale, Settings
from benchmarks.distillation.tables import trial_grid
from benchmarks.distillation.teachers import Sureness
from teacher_cache.cache.errors import did_you_mean
from teacher_cache.pipeline.reporting import quiet_libraries, reported

RESULTS = Path("benchmarks/results")
WORK = Path("runs/quality")
WIDTH = 180  # of the tables where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run was asked for; the options' help says more.

    Attributes:
        rows: to tune or to judge.
        seeds: of each row's students.
        scale: how much of everything.
        folders: of what is trained.
        tuning_file: where the choice of trials is kept.
        untuned: take each row's first trial instead.
        num_workers: students trained at the same time.
        num_threads: of torch for each.
        console: for progress and tables.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    scale: Scale
    folders: Folders
    tuning_file: Path
    untuned: bool
    num_workers: int
    num_threads: int
    console: Console

    @property
    def is_whole(self) -> bool:
        """Whether every row and seed is asked for."""
        return self.rows == ROWS and self.seeds == self.scale.seeds

    def say(self, line: str) -> None:
        """One line of progress."""
        self.console.print(line, highlight=False, markup=False)


def tune(run: Run) -> None:
    """Train each row's trials on the tuning corpora and write which one validates best."""
    rows = [row for row in run.rows if len(row.trials) > 1]
    seed = run.seeds[0]
    prepared = prepare("tuning", rows, run.scale, run.folders, run.console)
    asked = [(row, trial, seed) for row in rows for trial in row.trials]
    students = _trained(run, asked, prepared)
    tuned: dict[str, dict[str, Any]] = {}
    for row in rows:
        labels = prepared.held_out[row.block].labels
        trials: list[dict[str, Any]] = []
        for trial in row.trials:
            found = _answers(run, row, trial, (seed,), students, prepared)
            judged = figures(found.logits[0], labels, found.taught_by)
            trials.append({"settings": dict(trial)} | judged | {"seconds": found.seconds[0]})
        chosen = tuning.best(trials)["settings"]
        recipe = tuning.recipe(row, run.scale)
        tuned[row.key] = {"recipe": recipe, "trials": trials, "chosen": chosen}
    described = machine.describe(torch.device("cpu"))
    tuning.record(run.tuning_file, tuned, described, seed)
    run.console.print(trial_grid(tuned).rich())
    run.say(f"✓ {len(rows)} rows tuned: {run.tuning_file}")


def judge(run: Run) -> Findings:
    """Train each row as tuned on all that is no test movie's, and judge it by the test movies."""
    described = machine.describe(torch.device("cpu"))
    chosen = _choices(run)
    prepared = prepare("final", run.rows, run.scale, run.folders, run.console)
    asked = [(row, chosen[row.key], seed) for row in run.rows for seed in run.seeds]
    students = _trained(run, asked, prepared)
    found = [
        result
        for block in BLOCKS
        for result in _block_results(run, block, chosen, students, prepared)
    ]
    spent = _cost(run, chosen, students, prepared)
    standard = run.scale == FULL and run.is_whole
    return Findings(
        machine=described,
        settings={
            "scale": asdict(run.scale),
            "recipe": {row.key: tuning.recipe(row, run.scale) for row in run.rows},
            "seeds": run.seeds,
            "trials": "the first of each row" if run.untuned else str(run.tuning_file.name),
            "threads": run.num_threads,
        },
        results=found,
        sureness=_sureness(run, prepared),
        cost=spent,
        overlaps=prepared.overlaps,
        goals=goals(found, spent, standard=standard),
    )


def _choices(run: Run) -> dict[str, Settings]:
    if run.untuned:
        run.say("untuned: the first trial of each row")
        return {row.key: row.trials[0] if row.trials else {} for row in run.rows}
    chosen = {row.key: tuning.chosen(run.tuning_file, row, run.scale) for row in run.rows}
    run.say(f"each row's settings as {run.tuning_file} chose them by the validation movies")
    return chosen


def _trained(run: Run, asked: Sequence[tuple[Row, Settings, int]], prepared: Prepared) -> Students:
    students = Students(asked, prepared, run.folders, run.scale)
    run_jobs(students.jobs(), num_workers=run.num_workers, num_threads=run.num_threads, say=run.say)
    return students


def _answers(
    run: Run,
    row: Row,
    trial: Settings,
    seeds: tuple[int, ...],
    students: Students,
    prepared: Prepared,
) -> Answers:
    if row.kind == "student":
        return students.answers(row, trial, seeds)
    return baseline_answers(row, trial, prepared, run.scale)


def _block_results(
    run: Run,
    block: str,
    chosen: Mapping[str, Settings],
    students: Students,
    prepared: Prepared,
) -> list[Result]:
    rows = [row for row in run.rows if row.block == block]
    if not rows:
        return []
    held_out = prepared.held_out[rows[0].block]
    answers = [_answers(run, row, chosen[row.key], run.seeds, students, prepared) for row in rows]
    return results(answers, held_out.labels, held_out.movie_idx, run.scale.num_resamples)


def _sureness(run: Run, prepared: Prepared) -> list[Sureness]:
    found: list[Sureness] = []
    for row in run.rows:
        if row.kind == "teacher":
            held_out = prepared.held_out[row.block]
            name = f"teacher of {prepared.corpus(row).name}"
            logits = teacher_logits(row, prepared, run.scale)
            found.append(teachers.on_cached(f"{name}, its training text", prepared.cache(row)))
            found.append(teachers.sureness(f"{name}, test movies", logits, held_out.labels))
    return found


def _cost(
    run: Run, chosen: Mapping[str, Settings], students: Students, prepared: Prepared
) -> Cost | None:
    row = next((row for row in run.rows if row.key == "main/all"), None)
    if row is None:
        return None
    run.say("taking the CPU time of teacher and student")
    student = students.load(row, chosen[row.key], run.seeds[0])
    teacher = predictions.load_teacher(prepared.teacher(row), run.scale.teacher["max_length"])
    return cost.measure(
        {"teacher": teacher, "student": student},
        prepared.held_out[row.block].documents,
        num_batches=run.scale.cost_batches,
        num_repeats=run.scale.cost_repeats,
    )


def main(
    tune_first: Annotated[
        bool, typer.Option("--tune", help="Choose each row's trial on the validation movies.")
    ] = False,
    rows: Annotated[
        str, typer.Option(help="Only these, as in labels,logits; a row is in one block or both.")
    ] = "",
    blocks: Annotated[str, typer.Option(help="Of main,scarce.")] = ",".join(BLOCKS),
    seeds: Annotated[str, typer.Option(help="Of the students; as in 0,1,2.")] = "",
    work: Annotated[Path, typer.Option(help="Corpora, teachers, caches and runs go here.")] = WORK,
    results_folder: Annotated[
        Path, typer.Option("--results", help="What was chosen and measured goes here.")
    ] = RESULTS,
    jobs: Annotated[int, typer.Option(min=1, help="Students trained at the same time.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, for each of them.")] = 1,
    untuned: Annotated[
        bool, typer.Option("--untuned", help="Take each row's first trial; needs no --tune before.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Minutes only, to try it; the figures mean nothing.")
    ] = False,
) -> None:
    """What each ingredient of distillation gives a small student, on real movie reviews."""
    scale = TINY if tiny else FULL
    if tiny and results_folder == RESULTS:
        raise typer.BadParameter("--tiny measures nothing to keep there: give it another --results")
    console = Console(width=None if Console().is_terminal else WIDTH)
    run = Run(
        rows=_rows(rows, blocks),
        seeds=_seeds(seeds) or scale.seeds,
        scale=scale,
        folders=Folders(work),
        tuning_file=results_folder / tuning.FILE_NAME,
        untuned=untuned,
        num_workers=jobs,
        num_threads=threads,
        console=console,
    )
    # Teachers and caches are made one at a time, with all the threads that the students may have.
    torch.set_num_threads(jobs * threads)
    with reported():
        quiet_libraries()
        if tune_first:
            tune(run)
            return
        found = judge(run)
        found.show(console)
        if run.is_whole:
            found.write(results_folder)
            run.say(f"✓ written to {results_folder}")
        else:
            run.say(f"a part of the rows or seeds: nothing was written to {results_folder}")


def _rows(names: str, blocks: str) -> tuple[Row, ...]:
    wanted_blocks, wanted = _words(blocks), _words(names)
    known = {row.name for row in ROWS if row.block in wanted_blocks}
    for what, given, there in (("--blocks", wanted_blocks, BLOCKS), ("--rows", wanted, known)):
        for one in given:
            if one not in there:
                raise typer.BadParameter(f"{what} names {one!r}: {did_you_mean(one, there)}")
    return tuple(
        row for row in ROWS if row.block in wanted_blocks and (not wanted or row.name in wanted)
    )


def _seeds(written: str) -> tuple[int, ...]:
    words = _words(written)
    if not all(word.isdigit() for word in words):
        raise typer.BadParameter(f"--seeds is {written!r}, expected numbers such as 0,1,2")
    return tuple(dict.fromkeys(int(word) for word in words))


def _words(written: str) -> list[str]:
    return [word.strip() for word in written.split(",") if word.strip()]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
