"""The student; importing this package makes it known to transformers' Auto classes."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from teacher_cache.stages.student.backbone import (
    MambaStudentModel,
    MambaStudentPreTrainedModel,
)
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.position_map import PositionMap, choose

AutoConfig.register(MambaStudentConfig.model_type, MambaStudentConfig)
AutoModel.register(MambaStudentConfig, MambaStudentModel)
AutoModelForCausalLM.register(MambaStudentConfig, MambaStudentForCausalLM)
AutoModelForSequenceClassification.register(
    MambaStudentConfig, MambaStudentForSequenceClassification
)
# transformers' Trainer shifts the labels of `label_smoothing_factor` for the classes in this table
# alone, and no registration enters it; elsewhere it has each position learn its own token.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MambaStudentConfig.model_type] = MambaStudentForCausalLM.__name__

__all__ = [
    "MambaStudentConfig",
    "MambaStudentForCausalLM",
    "MambaStudentForSequenceClassification",
    "MambaStudentModel",
    "PositionMap",
    "build_language_model",
    "build_student",
    "choose",
]

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
