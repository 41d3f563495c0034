"""A causal language model ready to be scored: a teacher, or a student's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.device import resolve_device, resolve_dtype
from teacher_cache.stages.evaluation.model import TEACHER, EvaluatedModel
from teacher_cache.stages.evaluation.runs import finished_student, task_of
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.language_model import (
    check_language_model,
    final_states,
    head_logits,
    load_language_model,
)
from teacher_cache.stages.teacher.load import on_device
from teacher_cache.stages.teacher.support import Support
from teacher_cache.stages.tokenizers import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class LanguageModel(EvaluatedModel):
    """A causal language model; packed samples have at most its `max_length` tokens.

    Attributes:
        packs: whether several documents of a sample run in one row; each is one of its own if not.
    """

    packs: bool

    def states(self, sequences: Sequence[np.ndarray], lengths: Sequence[Sequence[int]]) -> Tensor:
        """What the head reads of every token, [N, D], the sequences end to end.

        Args:
            sequences: token ids, [S_i] each, N in all.
            lengths: of the documents of each, which nothing crosses.
        """
        is_on = self.autocast is not torch.float32
        with torch.autocast(self.model.device.type, self.autocast, enabled=is_on):
            return final_states(self.model, sequences, lengths, packs=self.packs)

    def logits(self, states: Tensor) -> Tensor:
        """[n, V] float32 of some of its states [n, D]; the head computes in float32."""
        return head_logits(self.model, states.float())


@dataclass(frozen=True, kw_only=True)
class TeacherModel(LanguageModel):
    """A teacher.

    Attributes:
        support: the ids that its distributions are over.
    """

    support: Support


def load_student_language_model(run: Path, config: DeviceConfig) -> LanguageModel:
    """Load a finished run's student.

    Raises:
        UserError: if the folder is no run, its training has not ended, its model is damaged or a
            classifier.
    """
    record = finished_student(run)
    if task_of([run]) != "lm":
        raise UserError(f"{run} is a classifier: give a language model's run")
    device = resolve_device(config)
    model = _load_model(run)
    # Each document of ours is a row of its own, so that nothing of packing has to be trusted.
    is_ours = isinstance(model, MambaStudentForCausalLM)
    packs = False if is_ours else check_language_model(str(run), model.eval())
    return LanguageModel(
        name=run.name,
        model=on_device(model, device, torch.float32),
        tokenizer=load_tokenizer(str(run.resolve()), option="RUN"),
        max_length=record.about["max_length"],
        autocast=resolve_dtype(config, device),
        packs=packs,
    )


def _load_model(run: Path) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(str(run.resolve()), dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the model in {run} cannot be loaded ({first_line(error)}): its files are damaged or "
            "of another version; train it again with --resume never"
        ) from error


def load_teacher_language_model(config: TeacherConfig) -> TeacherModel:
    """Load a teacher as a language model among others.

    Raises:
        UserError: as `load_language_model`.
    """
    teacher = load_language_model(config)
    return TeacherModel(
        name=TEACHER,
        model=teacher.model,
        tokenizer=teacher.tokenizer,
        max_length=teacher.max_length(config.max_length),
        packs=teacher.packs,
        support=Support.of_tokenizer(teacher.tokenizer, teacher.num_logits),
    )
