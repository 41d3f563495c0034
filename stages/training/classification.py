"""Stage two's task of a classifier's cache: one label and one row of logits a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.config import flag_of
from teacher_cache.stages.heads import Head, recorded_head
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import loss_of
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.pretrained import classifier_config
from teacher_cache.stages.training.auxiliaries import (
    Auxiliary,
    PooledProjection,
    with_auxiliaries,
)
from teacher_cache.stages.training.batches import SampleCollator
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.data import TrainingData, has_held_out_labels, training_data
from teacher_cache.stages.training.held_out import HeldOutSamples
from teacher_cache.stages.training.layers import Schedule
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.measures import Measure
from teacher_cache.stages.training.run_folder import PAIR
from teacher_cache.stages.training.start import StartingStudent, start_student
from teacher_cache.stages.training.task import Course, StudentTask
from teacher_cache.stages.training.terms import weighed
from teacher_cache.stages.training.views import SamplesView


class ClassificationStudents(StudentTask):
    """Labels and logits of samples.

    Raises:
        UserError: if the cache lacks the layers that are to be matched.
    """

    name = "classification"

    def __init__(self, config: TrainStudentConfig, readers: Sequence[CacheReader]):
        super().__init__(config, readers)
        self._head = recorded_head(readers[0].manifest.settings)
        _refuse_idle(config.objective, self._head)
        self._layers = CachedLayers.of(config.transfer, config.student, readers[0])

    @classmethod
    def described(cls, name: str) -> PreTrainedConfig:
        """A sequence classifier's."""
        return classifier_config(name)

    @cached_property
    def measure(self) -> Measure:
        """The accuracy, say; where no held-out sample has a label, how close the teacher is."""
        head = self._head
        has_labels = has_held_out_labels(self._config.training, self._readers[0], head)
        return head.quality if has_labels else head.closeness

    def course(self, joined: Joined) -> Course:
        """Samples of both kinds, and a Mamba with fresh weights or a pre-trained classifier."""
        data = training_data(
            self._config.training, self._config.objective, self._readers, head=self._head
        )
        id2label = self._readers[0].manifest.about["id2label"]
        student = start_student(
            self._config,
            joined,
            id2label={int(class_id): name for class_id, name in id2label.items()},
            head=self._head,
            lengths=np.concatenate([reader.lengths() for reader in self._readers]),
        )
        return Course(
            data=data,
            student=replace(
                student,
                # What means nothing to the head has no value.
                settings=student.settings | dict.fromkeys(self._head.idle_options),
                about=student.about | self._pair(),
            ),
            trained=with_auxiliaries(student.model, *self._auxiliaries(student, data)),
            lesson=lambda _: self._lesson(student, data),
            held_out=HeldOutSamples(self._head),
            collator=SampleCollator(student.pad_id, self._layers, head=self._head),
            max_length=joined.max_length,
            write_files=_write_none,
        )

    def _pair(self) -> dict[str, Any]:
        """The columns of a pair; nothing where documents are single texts."""
        column = self._readers[0].manifest.settings["data"]["labeled"].get("text_column")
        return {PAIR: column} if isinstance(column, list) else {}

    def _auxiliaries(self, student: StartingStudent, data: TrainingData) -> list[Auxiliary]:
        """Projections of the pooled state and of layers, where the teacher's are matched."""
        found, seed = list[Auxiliary](), self._config.training.seed
        if data.pooled_width is not None:
            assert isinstance(student.model, MambaStudentForSequenceClassification)  # by settings
            width = student.model.config.d_model
            found.append(PooledProjection(width, teacher_width=data.pooled_width, seed=seed))
        if self._layers is not None:
            found += self._layers.projections(student.model.config.d_model, seed=seed)
        return found

    def _lesson(self, student: StartingStudent, data: TrainingData) -> Lesson:
        """Logits and labels, and what else the settings weigh."""
        config = self._config.objective
        terms = weighed(config)
        if self._layers is not None:
            self._layers.say()
            terms += self._layers.terms(PositionMap.from_dict(student.model.config.position_map))
        return Lesson(
            view=SamplesView(loss_of(self._head)),
            objective=config,
            terms=terms,
            schedule=Schedule.of(self._config.transfer, data.num_steps),
        )


def _refuse_idle(config: ObjectiveConfig, head: Head) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming the first.
    """
    for option, reason in head.idle_options.items():
        if option in config.model_fields_set:
            raise UserError(
                f"{flag_of(option)} does nothing here: the teacher is {head.kind}, and {reason}; "
                "leave it out"
            )


def _write_none(_: Path) -> None:
    """A projection of states is a means, no result."""
