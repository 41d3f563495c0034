"""The student; importing this package makes it known to transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForSequenceClassification

from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.model import MambaForSequenceClassification, build_student
from teacher_cache.stages.student.position_map import PositionMap, choose

AutoConfig.register(MambaStudentConfig.model_type, MambaStudentConfig)
AutoModelForSequenceClassification.register(MambaStudentConfig, MambaForSequenceClassification)

__all__ = [
    "MambaForSequenceClassification",
    "MambaStudentConfig",
    "PositionMap",
    "build_student",
    "choose",
]
