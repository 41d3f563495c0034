"""What `benchmarks.transfer` trains: one student, by four ways of learning from its teacher."""

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
WEIGHTS = (0.1, 1.0)

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


def _trials(*weights: str) -> tuple[Settings, ...]:
    return tuple({"lr": LEARNING_RATE, **dict.fromkeys(weights, size)} for size in WEIGHTS)


def _row(name: str, title: str, trials: tuple[Settings, ...]) -> Row:
    return Row(name=name, title=title, block="main", overrides=LOGITS, trials=trials)


LOGITS_ROW = replace(_row("logits", "student, logits alone", LEARNING_RATES), is_baseline=True)
MAIN_ROWS: tuple[Row, ...] = (
    LOGITS_ROW,
    _row("hidden", "+ hidden states", _trials("hidden_weight")),
    _row("attention", "+ attention maps", _trials("attention_weight")),
    _row("both", "+ both", _trials("attention_weight", "hidden_weight")),
)
# The teacher of the second block learns from the same tenth of the labels as its students do.
ROWS: tuple[Row, ...] = (
    TEACHER_ROW,
    *MAIN_ROWS,
    replace(TEACHER_ROW, block="scarce"),
    *(replace(row, block="scarce", tuned_as=row.key) for row in MAIN_ROWS),
)
