"""A student with fresh weights."""

from __future__ import annotations

from typing import TypeVar

import torch

from teacher_cache.stages.student.backbone import MambaStudentPreTrainedModel
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM

AnyStudent = TypeVar("AnyStudent", bound=MambaStudentPreTrainedModel)


def build_student(
    config: MambaStudentConfig, *, seed: int
) -> MambaStudentForSequenceClassification:
    """A classifier whose fresh weights depend on `config` and `seed` alone.

    The global random state is neither read nor changed.
    """
    return _built(MambaStudentForSequenceClassification, config, seed)


def build_language_model(config: MambaStudentConfig, *, seed: int) -> MambaStudentForCausalLM:
    """A language model whose fresh weights depend on `config` and `seed` alone; as above.

    Raises:
        UserError: for a bidirectional configuration.
    """
    return _built(MambaStudentForCausalLM, config, seed)


def _built(kind: type[AnyStudent], config: MambaStudentConfig, seed: int) -> AnyStudent:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(config)
