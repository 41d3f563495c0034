"""The command line that the benchmarks of reviews share: which rows, where to, how fast."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.distillation.findings import Findings
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.judging import tune
from benchmarks.distillation.rows import BLOCKS
from benchmarks.distillation.run import Run, Table, choose_rows, choose_seeds
from teacher_cache.pipeline.reporting import quiet_libraries, reported

RESULTS = Path("benchmarks/results")
WIDTH = 180  # of the tables where there is no terminal


def command(table: Table, measure: Callable[[Run], Findings], about: str) -> typer.Typer:
    """A benchmark's command.

    Args:
        table: that it fills.
        measure: trains the rows as tuned, or finds them again, and judges them.
        about: one line for its help.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=about)
    def main(
        is_tuning: Annotated[
            bool, typer.Option("--tune", help="Choose each row's trial on the validation movies.")
        ] = False,
        rows: Annotated[
            str, typer.Option(help="Only these, as in labels,logits; a name may be in both blocks.")
        ] = "",
        blocks: Annotated[str, typer.Option(help=f"Of {', '.join(BLOCKS)}.")] = ",".join(
            table.usual_blocks
        ),
        seeds: Annotated[
            str, typer.Option(help="Of the students, as in 0,1; tuning takes the first.")
        ] = "",
        work: Annotated[
            Path, typer.Option(help="Corpora, teachers, caches and runs go here.")
        ] = Path("runs") / table.name,
        results_folder: Annotated[
            Path, typer.Option("--results", help="What was chosen and measured goes here.")
        ] = RESULTS,
        jobs: Annotated[int, typer.Option(min=1, help="Students trained at the same time.")] = 1,
        threads: Annotated[int, typer.Option(min=1, help="Of torch, for each of them.")] = 1,
        untuned: Annotated[
            bool,
            typer.Option("--untuned", help="Take each row's first trial; needs no --tune before."),
        ] = False,
        tiny: Annotated[
            bool, typer.Option("--tiny", help="Minutes only, to try it; the figures mean nothing.")
        ] = False,
    ) -> None:
        scale = table.tiny if tiny else table.full
        if tiny and results_folder == RESULTS:
            raise typer.BadParameter(
                "--tiny measures nothing to keep there: give another --results"
            )
        console = Console()
        run = Run(
            table=table,
            rows=choose_rows(table.rows, rows, blocks),
            seeds=choose_seeds(seeds) or scale.seeds,
            scale=scale,
            folders=Folders(work),
            results=results_folder,
            untuned=untuned,
            num_workers=jobs,
            num_threads=threads,
            console=console if console.is_terminal else Console(width=WIDTH),
        )
        # Teachers and caches are made one at a time, with all the threads the students may have.
        torch.set_num_threads(jobs * threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with reported():
            quiet_libraries()
            _do(run, measure, is_tuning=is_tuning)

    return app


def _do(run: Run, measure: Callable[[Run], Findings], *, is_tuning: bool) -> None:
    if is_tuning:
        tune(run)
        return
    found = measure(run)
    found.show(run.console)
    if run.is_whole:
        found.write(run.results, run.results_name)
        run.say(f"✓ written to {run.results}")
    else:
        run.say(f"only a part of the rows or seeds: nothing was written to {run.results}")
