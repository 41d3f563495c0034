from __future__ import annotations

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from teacher_cache.stages.training.measures import OBJECTIVE, EarlyStopping


def stops(accuracies: list[float], patience: int) -> bool:
    """Whether training stops at the last of these evaluations."""
    state, control = TrainerState(), TrainerControl()
    for accuracy in accuracies:
        state.log_history += [{"loss": 1.0}, {"eval_accuracy": accuracy}]
    EarlyStopping(patience).on_evaluate(TrainingArguments(use_cpu=True), state, control)
    return control.should_training_stop


@pytest.mark.parametrize(
    ("accuracies", "patience", "expected"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.6], 1, False),
        ([0.6, 0.5], 1, True),
        ([0.6, 0.6], 1, True),  # as good is not better
        ([0.6, 0.5, 0.5], 3, False),
        ([0.6, 0.5, 0.7, 0.5], 2, False),  # counted from the best
        ([0.6, 0.5, 0.7, 0.5, 0.7], 2, True),
    ],
)
def test_it_waits_as_long_as_told(accuracies: list[float], patience: int, expected: bool) -> None:
    assert stops(accuracies, patience) == expected


def test_a_loss_is_better_where_it_is_lower() -> None:
    state = TrainerState()
    for loss, expected in ((3.0, False), (2.0, False), (2.5, False), (2.0, True)):
        state.log_history.append({"eval_loss": loss, "eval_accuracy": loss})
        control = TrainerControl()
        stopping = EarlyStopping(2, OBJECTIVE)
        stopping.on_evaluate(TrainingArguments(use_cpu=True), state, control)
        assert control.should_training_stop == expected


def test_a_stop_that_was_asked_for_stays() -> None:
    control = TrainerControl(should_training_stop=True)
    EarlyStopping(1).on_evaluate(TrainingArguments(use_cpu=True), TrainerState(), control)
    assert control.should_training_stop
