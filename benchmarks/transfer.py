"""What a teacher's attention maps and hidden states give a Mamba student, on real movie reviews.

    python -m benchmarks.transfer --tune    # each row's trials, judged by the validation movies
    python -m benchmarks.transfer           # the rows as tuned, judged by the test movies

The same student learns from the logits alone, with the hidden states of two layers, with their
attention maps, and with both, at once or in stages: from all labels and their teacher, and from a
tenth of them and a teacher of that tenth. The test reviews judge its accuracy, and how far it is
inside from its teacher. Interrupted, it goes on; what is trained: `distillation/transfer_rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.distillation.command import command
from benchmarks.distillation.findings import Findings
from benchmarks.distillation.inside import Inside, distances
from benchmarks.distillation.judging import Judged
from benchmarks.distillation.rows import Row
from benchmarks.distillation.run import Run, Table
from benchmarks.distillation.training import judging_cache_config
from benchmarks.distillation.transfer_rows import BLOCKS, FULL, NUM_REVIEWS, ROWS, TINY
from benchmarks.goal import Goal
from teacher_cache.stages import cache_teacher

TABLE = Table(
    name="transfer",
    rows=ROWS,
    usual_blocks=BLOCKS,
    baseline="logits alone",
    full=FULL,
    tiny=TINY,
)


def measure(run: Run) -> Findings:
    """Train each row as tuned, judge it, and compare its inside with its teacher's."""
    judged = Judged.by(run)
    inside = [_inside(judged, row) for row in run.rows if row.kind == "student"]
    return judged.findings(list(goals(inside, standard=run.is_standard)), inside=inside)


def _inside(judged: Judged, row: Row) -> Inside:
    run, prepared = judged.run, judged.prepared
    corpus, teacher = prepared.corpus(row), prepared.teacher(row)
    cache = cache_teacher.run(judging_cache_config(corpus, teacher, run.folders, run.scale)).cache
    runs = [judged.models.run(row, judged.chosen[row.key], seed) for seed in run.seeds]
    run.say(f"comparing the inside of {row.key}")
    found = [distances(one, cache, NUM_REVIEWS) for one in runs]
    return Inside(
        key=row.key,
        title=row.title,
        block=row.block,
        num_reviews=found[0].num_reviews,
        map_kl=tuple(one.map_kl for one in found),
        even_kl=found[0].even_kl,
        hidden=tuple(one.hidden for one in found),
    )


def goals(inside: Sequence[Inside], *, standard: bool) -> Iterator[Goal]:
    """That what is matched comes nearer, in every seed, in each block.

    Args:
        inside: of the rows that were run.
        standard: whether the run is of the scale that the goals were set for.
    """
    by_key = {one.key: one for one in inside}
    for block in dict.fromkeys(one.block for one in inside):
        alone = by_key.get(f"{block}/logits")
        for row in ("attention", "both", "staged"):
            matched = by_key.get(f"{block}/{row}")
            what = f"{block}: KL of a map's row, {row} over logits alone, worst seed"
            worst = _worst(alone.map_kl, matched.map_kl) if alone and matched else None
            yield Goal(what, worst, 1.0, applies=standard)


def _worst(alone: Sequence[float], matched: Sequence[float]) -> float:
    return max(new / old for old, new in zip(alone, matched, strict=True))


app = command(TABLE, measure, "What a teacher's attention maps and hidden states give a student.")

if __name__ == "__main__":
    app()
