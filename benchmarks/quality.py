"""What each ingredient of distillation gives a small Mamba student, on real movie reviews.

    python -m benchmarks.quality --tune    # each row's trials, judged by the validation movies
    python -m benchmarks.quality           # the rows as tuned, judged by the test movies
    python -m benchmarks.quality --blocks long    # the recipe, trained eight times as long

Whatever is trained lies below the work folder and is found again, so either command may be
interrupted anywhere and run again, or run in parts. What is trained: `distillation/rows.py`.
"""

from __future__ import annotations

from benchmarks.distillation import cost
from benchmarks.distillation.command import command
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.findings import Findings
from benchmarks.distillation.judging import Judged
from benchmarks.distillation.quality_goals import goals
from benchmarks.distillation.rows import ROWS, USUAL_BLOCKS
from benchmarks.distillation.run import Run, Table
from benchmarks.distillation.scale import FULL, TINY

TABLE = Table(
    name="quality",
    rows=ROWS,
    usual_blocks=USUAL_BLOCKS,
    baseline="labels only",
    full=FULL,
    tiny=TINY,
)


def measure(run: Run) -> Findings:
    """Train each row as tuned, judge it, and take the CPU time of teacher and student."""
    judged = Judged.by(run)
    spent = _cost(judged)
    return judged.findings(goals(judged.results, spent, standard=run.is_standard), cost=spent)


def _cost(judged: Judged) -> Cost | None:
    run = judged.run
    row = next((row for row in run.rows if row.key == "main/all"), None)
    if row is None:
        return None
    run.say("taking the CPU time of teacher and student")
    return cost.measure(
        {
            "teacher": judged.models.load_teacher(row),
            "student": judged.models.load_student(row, judged.chosen[row.key], run.seeds[0]),
        },
        judged.prepared.held_out[row.block].documents,
        num_batches=run.scale.cost_batches,
        num_repeats=run.scale.cost_repeats,
    )


app = command(
    TABLE, measure, "What each ingredient of distillation gives a small student, on real reviews."
)

if __name__ == "__main__":
    app()
