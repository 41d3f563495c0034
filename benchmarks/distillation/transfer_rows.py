"""What `benchmarks.transfer` trains: one student, by five ways of learning from its teacher."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.distillation.rows import (
    LEARNING_RATES,
    LOGITS,
    TEACHER_ROW,
    Block,
    Row,
    Settings,
)
from benchmarks.distillation.scale import FULL as QUALITY
from benchmarks.distillation.scale import TINY as TINY_QUALITY

BLOCKS: tuple[Block, ...] = ("main", "scarce")

# MiniLM's layers are 0 to 5; the student's two match them by proportion.
LAYERS = "2,5"
CAPTURED: Settings = {"hidden": LAYERS, "attention": "mean", "attention_layers": LAYERS}
LEARNING_RATE = 2e-3  # that tuning chose for every distilled row of the quality benchmark

FULL = replace(
    QUALITY,
    captured=CAPTURED,
    views=dict.fromkeys(QUALITY.views, 0),
    tuning_steps=250,
    tuning_views=0,
)
TINY = replace(
    TINY_QUALITY,
    captured=CAPTURED,
    views=dict.fromkeys(QUALITY.views, 0),
    tuning_views=0,
)

NUM_REVIEWS = 512  # whose maps and states are compared


def _row(name: str, title: str, *trials: Settings) -> Row:
    at_one_rate = tuple({"lr": LEARNING_RATE} | trial for trial in trials)
    return Row(name=name, title=title, block="main", overrides=LOGITS, trials=at_one_rate)


BOTH: Settings = {"attention_weight": 1.0, "hidden_weight": 1.0}
MAIN_ROWS: tuple[Row, ...] = (
    replace(_row("logits", "student, logits alone"), trials=LEARNING_RATES, is_baseline=True),
    _row("hidden", "+ hidden states", {"hidden_weight": 0.1}, {"hidden_weight": 1.0}),
    _row("attention", "+ attention maps", {"attention_weight": 0.01}, {"attention_weight": 0.1}),
    _row("both", "+ both", BOTH | {"attention_weight": 0.01}, BOTH | {"attention_weight": 0.1}),
    _row(
        "staged",
        "+ both, in stages",
        BOTH | {"transfer_schedule": "staged", "transfer_shares": "0.1,0.1"},
        BOTH | {"transfer_schedule": "staged", "transfer_shares": "0.2,0.2"},
    ),
)
# The teacher of the second block learns from the same tenth of the labels as its students do.
ROWS: tuple[Row, ...] = (
    TEACHER_ROW,
    *MAIN_ROWS,
    replace(TEACHER_ROW, block="scarce"),
    *(replace(row, block="scarce", tuned_as=row.key) for row in MAIN_ROWS),
)
