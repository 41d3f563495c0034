"""Stop training when the held-out accuracy no longer rises."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(TrainerCallback):
    """Stop after so many evaluations without a better accuracy.

    Counted from the log, which every checkpoint holds, so that a resumed training stops where an
    uninterrupted one does; transformers' own callback begins to count anew.

    Args:
        patience: evaluations.
    """

    def __init__(self, patience: int):
        self._patience = patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop if this evaluation was the last one to wait for."""
        control.should_training_stop |= self._is_spent(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop again where a killed run had stopped, whatever this step would bring."""
        if self._is_spent(state):
            control.should_evaluate = control.should_save = False
            control.should_training_stop = True

    def _is_spent(self, state: TrainerState) -> bool:
        found = [one["eval_accuracy"] for one in state.log_history if "eval_accuracy" in one]
        return bool(found) and len(found) - 1 - int(np.argmax(found)) >= self._patience
