"""A student with fresh weights."""

from __future__ import annotations

import torch

from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.config import MambaStudentConfig


def build_student(
    config: MambaStudentConfig, *, seed: int
) -> MambaStudentForSequenceClassification:
    """A classifier whose fresh weights depend on `config` and `seed` alone.

    The global random state is neither read nor changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MambaStudentForSequenceClassification(config)
