"""Weights to and from other implementations of the same mixers, exactly or not at all."""

from teacher_cache.stages.student.interchange.mamba_ssm import load_mamba_ssm, save_mamba_ssm
from teacher_cache.stages.student.interchange.transformers_mamba import (
    from_transformers,
    to_transformers,
)

__all__ = ["from_transformers", "load_mamba_ssm", "save_mamba_ssm", "to_transformers"]
