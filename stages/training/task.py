"""What stage two asks of a task: the part of it that depends on what the cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from transformers import TrainerCallback, TrainingArguments

from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.training.data import TrainingData
from teacher_cache.stages.training.measures import Measure
from teacher_cache.stages.training.objective_trainer import ObjectiveTrainer
from teacher_cache.stages.training.start import StartingStudent


class TrainingObserver:
    """Told what happens while a teacher or a student trains; the base says nothing."""

    def on_start(self, run: Path, num_steps: int, checkpoint: Path | None) -> None:
        """Training begins, or goes on from a checkpoint."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer: a progress bar, say."""
        return []


class StudentTask(Protocol):
    """A cache of one kind, and how students learn from it.

    Made of the run's settings and the splits that take part; making it refuses settings that are
    another task's.
    """

    @property
    def label_names(self) -> list[str]:
        """Keys of a held-out batch that hold targets."""
        ...

    @property
    def measure(self) -> Measure:
        """By which early stopping knows the better of two evaluations."""
        ...

    def data(self, joined: Joined) -> TrainingData:
        """Samples and their order.

        Raises:
            UserError: if there is too little to train on.
        """
        ...

    def start(self, joined: Joined) -> StartingStudent:
        """The student before its first step.

        Raises:
            UserError: if it cannot be built, or does not fit the tokenizer or the cache.
            CheckFailed: if it would lose tokens, or a file of the cache is damaged.
        """
        ...

    def trainer(
        self,
        student: StartingStudent,
        data: TrainingData,
        *,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ) -> ObjectiveTrainer:
        """What trains it; on the device of `args`."""
        ...

    def write_files(self, folder: Path, trained: torch.nn.Module) -> None:
        """Commit what the run keeps beside the student.

        Raises:
            UserError: where the file system refuses.
        """
        ...
