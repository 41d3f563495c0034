"""The student; importing this package makes it known to transformers' Auto classes."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from teacher_cache.stages.student.backbone import MambaStudentModel
from teacher_cache.stages.student.build import build_student
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
    "build_student",
    "choose",
]
