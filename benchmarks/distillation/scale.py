"""How much of everything a run of a benchmark of reviews takes: all of it, or enough to try it."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.distillation.rows import (
    BLOCKS,
    CAPTURED,
    MAX_LENGTH,
    NUM_STEPS,
    NUM_VIEWS,
    STUDENT,
    TEACHERS,
    TUNING_STEPS,
    TUNING_VIEWS,
    Block,
    Settings,
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything a run takes.

    Attributes:
        num_test_movies: the first of the published order.
        num_validation_movies: the next.
        num_training_movies: of those behind them; None for all.
        num_scarce: labels of the label-scarce block.
        captured: `CacheTeacherConfig`'s settings of what is kept beside the logits.
        views: perturbed copies of each document in the caches, by block.
        seeds: of the students of each row.
        num_resamples: of the bootstrap.
        cost_batches: of 32 test reviews, whose CPU time is taken.
        cost_repeats: timed passes over them.
        max_length: of samples, in tokens.
        teachers: `FinetuneTeacherConfig`'s settings, by the block whose labels it learns from.
        student: `TrainStudentConfig`'s settings, before a row's.
        num_steps: optimizer steps of every student, by block.
        tuning_steps: of a trial, in place of `num_steps`.
        tuning_views: in the cache that trials are trained from, in place of `views`.
    """

    num_test_movies: int = 100
    num_validation_movies: int = 50
    num_training_movies: int | None = None
    num_scarce: int = 1000
    captured: Settings = field(default_factory=lambda: CAPTURED)
    views: dict[Block, int] = field(default_factory=lambda: NUM_VIEWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_resamples: int = 10_000
    cost_batches: int = 16
    cost_repeats: int = 9
    max_length: int = MAX_LENGTH
    teachers: dict[Block, Settings] = field(default_factory=lambda: TEACHERS)
    student: Settings = field(default_factory=lambda: STUDENT)
    num_steps: dict[Block, int] = field(default_factory=lambda: NUM_STEPS)
    tuning_steps: int = TUNING_STEPS
    tuning_views: int = TUNING_VIEWS


FULL = Scale()
# Minutes on two cores, to try the machine; its figures mean nothing.
TINY = Scale(
    num_test_movies=3,
    num_validation_movies=2,
    num_training_movies=8,
    num_scarce=40,
    views=dict.fromkeys(BLOCKS, 1),
    seeds=(0,),
    num_resamples=200,
    cost_batches=1,
    cost_repeats=1,
    max_length=16,
    teachers={block: {"max_steps": 2, "eval_fraction": 0, "batch_size": 4} for block in BLOCKS},
    student=STUDENT
    | {"d_model": 16, "num_layers": 1, "expand": 2, "d_state": 8, "head_dim": 8}
    | {"batch_size": 4, "checkpoint_steps": 2, "log_steps": 1},
    num_steps=dict.fromkeys(BLOCKS, 4),
    tuning_steps=3,
    tuning_views=1,
)
