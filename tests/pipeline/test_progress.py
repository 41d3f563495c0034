"""What the progress bar shows."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from teacher_cache.pipeline.progress import TrainingBar


def test_a_line_shows_the_loss_and_every_term_in_the_order_of_the_log() -> None:
    shown = io.StringIO()
    args: Any = SimpleNamespace(logging_steps=1)
    state: Any = SimpleNamespace(global_step=20, max_steps=30)
    logs = {"loss": 1.5, "grad_norm": 3.0, "learning_rate": 0.1, "epoch": 0.2}
    bar = TrainingBar(Console(file=shown, width=200), "student")
    control: Any = SimpleNamespace()
    bar.on_train_begin(args, state, control)
    bar.on_log(args, state, control, logs | {"kd": 0.25, "a_new_term": 2.0})
    bar.on_log(args, state, control, {"train_loss": 9.0})
    bar.on_train_end(args, state, control)
    assert "step 20: loss 1.500  kd 0.250  a_new_term 2.000\n" in shown.getvalue()
    assert "9.000" not in shown.getvalue()
