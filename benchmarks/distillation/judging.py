"""Train a table's rows: each trial judged by validation movies, or as tuned by test movies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks import machine
from benchmarks.distillation import teachers, tuning
from benchmarks.distillation.answers import Asked, Models
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.findings import Findings
from benchmarks.distillation.inside import Inside
from benchmarks.distillation.jobs import run_jobs
from benchmarks.distillation.preparation import Prepared, prepare
from benchmarks.distillation.results import Result, figures, results
from benchmarks.distillation.rows import BLOCKS, Row, Settings
from benchmarks.distillation.run import Run
from benchmarks.distillation.tables import trial_grid
from benchmarks.distillation.teachers import Sureness
from benchmarks.goal import Goal


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


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Rows as tuned, trained on all that is no test movie's, and judged by the test movies.

    Attributes:
        run: that was asked for.
        machine: as it was before.
        chosen: the trial of each row, by its key.
        prepared: what its students learned from.
        models: that were trained.
        results: of all rows, block by block.
    """

    run: Run
    machine: dict[str, Any]
    chosen: dict[str, Settings]
    prepared: Prepared
    models: Models
    results: list[Result]

    @classmethod
    def by(cls, run: Run) -> Judged:
        """Train what a run asks for, or find it again, and judge it."""
        described, chosen = machine.describe(torch.device("cpu")), run.chosen()
        prepared = prepare("final", run.rows, run.scale, run.folders, run.console)
        asked = [(row, chosen[row.key], seed) for row in run.rows for seed in run.seeds]
        models = _trained(run, asked, prepared)
        found: list[Result] = []
        for block in run.blocks:
            rows = [row for row in run.rows if row.block == block]
            answers = [models.answers(row, chosen[row.key], run.seeds) for row in rows]
            judge = prepared.held_out[block]
            found += results(answers, judge.labels, judge.movie_idx, run.scale.num_resamples)
        return cls(
            run=run,
            machine=described,
            chosen=chosen,
            prepared=prepared,
            models=models,
            results=found,
        )

    def findings(
        self, goals: Sequence[Goal], *, cost: Cost | None = None, inside: Sequence[Inside] = ()
    ) -> Findings:
        """All that there is to show.

        Args:
            goals: with what was measured.
            cost: CPU time of teacher and student, where it was measured.
            inside: distances of each row's students to their teacher's inside, if measured.
        """
        run = self.run
        return Findings(
            command=f"{run.table.command} --blocks {','.join(run.blocks)}",
            machine=self.machine,
            settings={
                "scale": asdict(run.scale),
                "recipe": {row.key: tuning.recipe(row, run.scale) for row in run.rows},
                "seeds": run.seeds,
                "trials": "the first of each row"
                if run.untuned
                else "as the validation movies chose them",
                "threads": run.num_threads,
            },
            titles={row.block: self._title(row) for row in run.rows},
            baseline=run.table.baseline,
            results=self.results,
            sureness=self._sureness(),
            inside=inside,
            cost=cost,
            overlaps=self.prepared.overlaps,
            goals=goals,
        )

    def _sureness(self) -> list[Sureness]:
        found: list[Sureness] = []
        for row in self.run.rows:
            if row.kind == "teacher" and row.teacher == "own":
                name, held_out = self.prepared.corpus(row).name, self.prepared.held_out[row.block]
                cache, logits = self.prepared.cache(row), self.models.teacher_prediction(row).logits
                found.append(teachers.on_cached(f"teacher of {name}, its labels", cache))
                judged = teachers.sureness(f"teacher of {name}, test", logits, held_out.labels)
                found.append(judged)
        return found

    def _title(self, row: Row) -> str:
        corpus = self.prepared.corpus(row)
        return (
            f"{BLOCKS[row.block]}: {len(corpus.train):,}, and {len(corpus.unlabeled):,} texts "
            f"without; {len(corpus.held_out):,} test reviews"
        )


def _trained(run: Run, asked: Sequence[Asked], prepared: Prepared) -> Models:
    models = Models(asked, prepared, run.folders, run.scale)
    run_jobs(models.jobs(), num_workers=run.num_workers, num_threads=run.num_threads, say=run.say)
    return models
