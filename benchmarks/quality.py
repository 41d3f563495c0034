"""What each ingredient of distillation gives a small Mamba student, on real movie reviews.

    python -m benchmarks.quality --tune    # each row's trials, judged by the validation movies
    python -m benchmarks.quality           # the rows as tuned, judged by the test movies
    python -m benchmarks.quality --blocks long    # the recipe, trained eight times as long

Whatever is trained lies below the work folder and is found again, so either command may be
interrupted anywhere and run again, or run in parts. What is trained: `distillation/rows.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import machine
from benchmarks.distillation import cost, teachers, tuning
from benchmarks.distillation.answers import Asked, Models
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.findings import Findings
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.jobs import run_jobs
from benchmarks.distillation.preparation import Prepared, prepare
from benchmarks.distillation.quality_goals import goals
from benchmarks.distillation.results import Result, figures, results
from benchmarks.distillation.rows import BLOCKS, USUAL_BLOCKS, Row, Settings
from benchmarks.distillation.run import Run, choose_rows, choose_seeds
from benchmarks.distillation.scale import FULL, TINY
from benchmarks.distillation.tables import trial_grid
from benchmarks.distillation.teachers import Sureness
from teacher_cache.pipeline.reporting import quiet_libraries, reported

RESULTS = Path("benchmarks/results")
WORK = Path("runs/quality")
WIDTH = 180  # of the tables where there is no terminal


def tune(run: Run) -> None:
    """Train each row's trials on the tuning corpora, and write which one validates best."""
    rows = [row for row in run.rows if len(row.trials) > 1 and row.tuned_as is None]
    run, seed = replace(run, scale=tuning.tuning_scale(run.scale)), run.seeds[0]
    prepared = prepare("tuning", rows, run.scale, run.folders, run.console)
    asked = [(row, trial, seed) for row in rows for trial in row.trials]
    models = _trained(run, asked, prepared)
    tuned: dict[str, dict[str, Any]] = {}
    for row in rows:
        labels = prepared.held_out[row.block].labels
        trials: list[dict[str, Any]] = []
        for trial in row.trials:
            found = models.answers(row, trial, (seed,))
            judged = figures(found.logits[0], labels, found.taught_by)
            trials.append({"settings": trial, **judged, "seconds": found.seconds[0]})
        tuned[row.key] = {
            "recipe": tuning.recipe(row, run.scale),
            "trials": trials,
            "chosen": tuning.best(trials)["settings"],
        }
    tuning.record(run.tuning_file, tuned, machine.describe(torch.device("cpu")), seed)
    run.console.print(trial_grid(tuned).rich())
    run.say(f"✓ {len(rows)} rows tuned: {run.tuning_file}")


def judge(run: Run) -> Findings:
    """Train each row as tuned on all that is no test movie's, and judge it by the test movies."""
    described = machine.describe(torch.device("cpu"))
    chosen = run.chosen()
    prepared = prepare("final", run.rows, run.scale, run.folders, run.console)
    asked = [(row, chosen[row.key], seed) for row in run.rows for seed in run.seeds]
    models = _trained(run, asked, prepared)
    found = [
        result for block in BLOCKS for result in _results(run, block, chosen, models, prepared)
    ]
    spent = _cost(run, chosen, models, prepared)
    return Findings(
        machine=described,
        settings={
            "scale": asdict(run.scale),
            "recipe": {row.key: tuning.recipe(row, run.scale) for row in run.rows},
            "seeds": run.seeds,
            "trials": "the first of each row"
            if run.untuned
            else "as the validation movies chose them",
            "threads": run.num_threads,
        },
        titles={row.block: _title(row, prepared) for row in run.rows},
        results=found,
        sureness=_sureness(run, models, prepared),
        cost=spent,
        overlaps=prepared.overlaps,
        goals=goals(found, spent, standard=run.is_standard),
    )


def _trained(run: Run, asked: Sequence[Asked], prepared: Prepared) -> Models:
    models = Models(asked, prepared, run.folders, run.scale)
    run_jobs(models.jobs(), num_workers=run.num_workers, num_threads=run.num_threads, say=run.say)
    return models


def _results(
    run: Run, block: str, chosen: Mapping[str, Settings], models: Models, prepared: Prepared
) -> list[Result]:
    rows = [row for row in run.rows if row.block == block]
    if not rows:
        return []
    held_out = prepared.held_out[rows[0].block]
    answers = [models.answers(row, chosen[row.key], run.seeds) for row in rows]
    return results(answers, held_out.labels, held_out.movie_idx, run.scale.num_resamples)


def _sureness(run: Run, models: Models, prepared: Prepared) -> list[Sureness]:
    found: list[Sureness] = []
    for row in run.rows:
        if row.kind == "teacher" and row.teacher == "own":
            name, held_out = prepared.corpus(row).name, prepared.held_out[row.block]
            logits = models.teacher_prediction(row).logits
            found.append(teachers.on_cached(f"teacher of {name}, its labels", prepared.cache(row)))
            judged = teachers.sureness(f"teacher of {name}, test", logits, held_out.labels)
            found.append(judged)
    return found


def _cost(
    run: Run, chosen: Mapping[str, Settings], models: Models, prepared: Prepared
) -> Cost | None:
    row = next((row for row in run.rows if row.key == "main/all"), None)
    if row is None:
        return None
    run.say("taking the CPU time of teacher and student")
    return cost.measure(
        {
            "teacher": models.load_teacher(row),
            "student": models.load_student(row, chosen[row.key], run.seeds[0]),
        },
        prepared.held_out[row.block].documents,
        num_batches=run.scale.cost_batches,
        num_repeats=run.scale.cost_repeats,
    )


def _title(row: Row, prepared: Prepared) -> str:
    corpus = prepared.corpus(row)
    return (
        f"{BLOCKS[row.block]}: {len(corpus.train):,}, and {len(corpus.unlabeled):,} texts without; "
        f"{len(corpus.held_out):,} test reviews"
    )


def main(
    is_tuning: Annotated[
        bool, typer.Option("--tune", help="Choose each row's trial on the validation movies.")
    ] = False,
    rows: Annotated[
        str, typer.Option(help="Only these, as in labels,logits; a name may be in both blocks.")
    ] = "",
    blocks: Annotated[str, typer.Option(help=f"Of {', '.join(BLOCKS)}.")] = ",".join(USUAL_BLOCKS),
    seeds: Annotated[
        str, typer.Option(help="Of the students, as in 0,1; tuning takes the first.")
    ] = "",
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
        raise typer.BadParameter("--tiny measures nothing to keep there: give another --results")
    console = Console()
    run = Run(
        rows=choose_rows(rows, blocks),
        seeds=choose_seeds(seeds) or scale.seeds,
        scale=scale,
        folders=Folders(work),
        results=results_folder,
        untuned=untuned,
        num_workers=jobs,
        num_threads=threads,
        console=console if console.is_terminal else Console(width=WIDTH),
    )
    # Teachers and caches are made one at a time, with all the threads that the students may have.
    torch.set_num_threads(jobs * threads)
    with reported():
        quiet_libraries()
        if is_tuning:
            tune(run)
            return
        found = judge(run)
        found.show(run.console)
        if run.is_whole:
            found.write(run.results, run.results_name)
            run.say(f"✓ written to {run.results}")
        else:
            run.say(f"only a part of the rows or seeds: nothing was written to {run.results}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
