"""A sequence classifier ready to classify text: a teacher's folder or a student's run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import teacher_cache.stages.student  # noqa: F401  (registers the student with the AutoClasses)
from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.data.tokenization import Sample, tokenize
from teacher_cache.stages.device import resolve_device, resolve_dtype
from teacher_cache.stages.evaluation.model import TEACHER, EvaluatedModel
from teacher_cache.stages.evaluation.runs import finished_student, task_of
from teacher_cache.stages.inference import class_logits
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import class_names, load_teacher, on_device
from teacher_cache.stages.tokenizers import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Classifier(EvaluatedModel):
    """A sequence classifier; documents are cut at its `max_length`.

    Attributes:
        pad_id: fills batches; masked.
        id2label: class names by id.
    """

    pad_id: int
    id2label: dict[int, str]

    def tokenize(self, documents: list[Document]) -> list[Sample]:
        """Samples of the documents that are not empty, in their order."""
        return tokenize(documents, self.tokenizer, max_length=self.max_length)

    def logits(self, samples: list[Sample], *, batch_tokens: int) -> np.ndarray:
        """Class logits [N, C] float32, in the samples' order."""
        return class_logits(
            self.model,
            [sample.input_ids for sample in samples],
            num_classes=len(self.id2label),
            pad_id=self.pad_id,
            max_tokens=batch_tokens,
            autocast=self.autocast,
        ).logits


def load_student(run: Path, config: DeviceConfig) -> Classifier:
    """Load a finished run's student.

    Raises:
        UserError: if the folder is no run, its training has not ended, its model is damaged or a
            language model.
    """
    record = finished_student(run)
    if task_of([run]) == "lm":
        raise UserError(f"{run} is a language model: give a classifier's run")
    device = resolve_device(config)
    model = _load_model(run)
    tokenizer = load_tokenizer(str(run.resolve()), option="RUN")
    return Classifier(
        name=run.name,
        model=on_device(model, device, torch.float32),
        tokenizer=tokenizer,
        pad_id=model.config.pad_token_id or 0,
        max_length=record.about["max_length"],
        id2label=class_names(model),
        autocast=resolve_dtype(config, device),
    )


def _load_model(run: Path) -> PreTrainedModel:
    try:
        return AutoModelForSequenceClassification.from_pretrained(str(run.resolve()))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the model in {run} cannot be loaded ({first_line(error)}): its files are damaged or "
            "of another version; train it again with --resume never"
        ) from error


def load_teacher_classifier(config: TeacherConfig) -> Classifier:
    """Load a teacher as a classifier among others.

    Raises:
        UserError: as `load_teacher`.
    """
    teacher = load_teacher(config)
    return Classifier(
        name=TEACHER,
        model=teacher.model,
        tokenizer=teacher.tokenizer,
        pad_id=teacher.pad_id,
        max_length=teacher.max_length(config.max_length),
        id2label=teacher.id2label,
    )
