"""Stop training when what is held out no longer gets better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What tells the better of two evaluations.

    Attributes:
        name: of the held-out metric, without `eval_`.
        higher_is_better: whether more of it is better.
    """

    name: str
    higher_is_better: bool


ACCURACY = Measure(name="accuracy", higher_is_better=True)
OBJECTIVE = Measure(name="loss", higher_is_better=False)


class EarlyStopping(TrainerCallback):
    """Stop after so many evaluations without a better one.

    Counted from the log, which every checkpoint holds, so that a resumed training stops where an
    uninterrupted one does; transformers' own callback begins to count anew.

    Args:
        patience: evaluations.
        measure: of how good one is.
    """

    def __init__(self, patience: int, measure: Measure = ACCURACY):
        self._patience = patience
        self._name = f"eval_{measure.name}"
        self._sign = 1 if measure.higher_is_better else -1

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
        log = state.log_history
        found = [self._sign * one[self._name] for one in log if self._name in one]
        return bool(found) and len(found) - 1 - int(np.argmax(found)) >= self._patience
