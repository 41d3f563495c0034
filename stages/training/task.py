"""What stage two asks of a task: the part of it that depends on what the cache holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedConfig, TrainerCallback

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.data import TrainingData
from teacher_cache.stages.training.held_out import HeldOut
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.measures import Measure
from teacher_cache.stages.training.start import StartingStudent


class TrainingObserver:
    """Told what happens while a teacher or a student trains; the base says nothing."""

    def on_start(self, run: Path, num_steps: int, checkpoint: Path | None) -> None:
        """Training begins, or goes on from a checkpoint."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer: a progress bar, say."""
        return []


@dataclass(frozen=True, kw_only=True)
class Course:
    """All that a training needs; what can be refused was refused when it was made.

    Attributes:
        data: samples and their order.
        student: before its first step.
        trained: the student with what learns beside it.
        lesson: what a micro-batch teaches, on a device.
        held_out: what a held-out one is measured by.
        collator: stacks samples into batches.
        max_length: tokens at which the run's tokenizer is to cut new texts; none if it is not.
        write_files: commits what the run keeps beside the student, into the folder it is given.
    """

    data: TrainingData
    student: StartingStudent
    trained: torch.nn.Module
    lesson: Callable[[torch.device], Lesson]
    held_out: HeldOut
    collator: Callable[..., dict[str, torch.Tensor]]
    max_length: int | None
    write_files: Callable[[Path], None]


class StudentTask(ABC):
    """A cache of one kind, and how students learn from it.

    Args:
        config: the run's settings.
        readers: of the splits that take part.
    """

    name: ClassVar[str]

    def __init__(self, config: TrainStudentConfig, readers: Sequence[CacheReader]):
        self._config = config
        self._readers = readers

    @classmethod
    @abstractmethod
    def described(cls, name: str) -> PreTrainedConfig:
        """The configuration of a pre-trained student.

        Raises:
            UserError: if there is none of that name, or it is of another kind.
        """

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """By which early stopping knows the better of two evaluations."""

    @abstractmethod
    def course(self, joined: Joined) -> Course:
        """Samples, student and losses, once the tokenizations were compared.

        Raises:
            UserError: if there is too little to train on, or the student cannot be built or does
                not fit the tokenizer or the cache.
            CheckFailed: if it would lose tokens, or a file of the cache is damaged.
        """
