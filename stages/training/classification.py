"""Stage two's task of a classifier's cache: one label and one row of logits a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.training.auxiliaries import ProjectedStudent, with_projected_layers
from teacher_cache.stages.training.batches import Collator
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.data import TrainingData, training_data
from teacher_cache.stages.training.measures import (
    ACCURACY,
    Measure,
    agreement_metrics,
    classification_metrics,
)
from teacher_cache.stages.training.start import StartingStudent, start_student
from teacher_cache.stages.training.trainer import DistillationTrainer


class ClassificationStudents:
    """A `StudentTask`.

    Raises:
        UserError: if the cache lacks the layers that are to be matched.
    """

    def __init__(self, config: TrainStudentConfig, readers: Sequence[CacheReader]):
        self._config = config
        self._readers = readers
        self._layers = CachedLayers.of(config, readers[0])

    @property
    def label_names(self) -> list[str]:
        """Labels and what is compared with the student's logits."""
        return ["labels", "teacher_logits"]

    @property
    def measure(self) -> Measure:
        """The accuracy."""
        return ACCURACY

    def data(self, joined: Joined) -> TrainingData:
        """Samples of both kinds, and their order."""
        return training_data(self._config, self._readers)

    def start(self, joined: Joined) -> StartingStudent:
        """A Mamba with fresh weights, or a pre-trained classifier."""
        id2label = self._readers[0].manifest.about["id2label"]
        return start_student(
            self._config,
            joined,
            id2label={int(class_id): name for class_id, name in id2label.items()},
            lengths=np.concatenate([reader.lengths() for reader in self._readers]),
        )

    def trainer(
        self,
        student: StartingStudent,
        data: TrainingData,
        *,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ) -> DistillationTrainer:
        """On logits, labels and what else the objective weighs."""
        transfer = None
        if self._layers is not None:
            self._layers.say()
            position_map = PositionMap.from_dict(student.model.config.position_map)
            transfer = self._layers.transfer(position_map=position_map, num_steps=data.num_steps)
        return DistillationTrainer(
            model=with_projected_layers(
                _trained_module(self._config, student.model, data), self._layers
            ),
            args=args,
            objective=self._config,
            embedding_lr_scale=self._config.embedding_lr_scale,
            transfer=transfer,
            batches=data.batches,
            train_dataset=data.training,
            eval_dataset=data.evaluation,
            data_collator=Collator(student.pad_id, self._layers),
            compute_metrics=_metrics,
            callbacks=callbacks,
        )

    def write_files(self, folder: Path, trained: torch.nn.Module) -> None:
        """None: a projection of states is a means, no result."""


def _trained_module(
    config: TrainStudentConfig, student: PreTrainedModel, data: TrainingData
) -> torch.nn.Module:
    """The student, with a projection of its pooled state where the teacher's is matched."""
    if data.pooled_width is None:
        return student
    assert isinstance(student, MambaStudentForSequenceClassification), "the settings see to it"
    return ProjectedStudent(student, teacher_width=data.pooled_width, seed=config.seed)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits = np.asarray(prediction.predictions)
    labels, teacher_logits = (np.asarray(one) for one in prediction.label_ids)
    return {
        **classification_metrics(logits, labels),
        **agreement_metrics(logits, teacher_logits),
    }
