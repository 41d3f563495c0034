"""Distil a transformer teacher into a Mamba student, offline.

The folders beside this file are links to those at the top of the repository. What is named here
is the public interface; each name is loaded when it is first asked for, so that reading a cache
needs no torch and `pipe --help` no models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.cache.errors import CheckFailed, UserError
    from teacher_cache.cache.reader import CacheReader
    from teacher_cache.cache.writer import CacheWriter
    from teacher_cache.stages.cache_log_probs import Engine, LogProbFile, cache_log_probs
    from teacher_cache.stages.losses.distributions import TeacherDistribution
    from teacher_cache.stages.losses.divergences import divergence
    from teacher_cache.stages.losses.objective import distillation_objective
    from teacher_cache.stages.student import (
        MambaStudentConfig,
        MambaStudentForCausalLM,
        MambaStudentForSequenceClassification,
    )
    from teacher_cache.stages.training.batches import CachedSamples, SampleCollator

_STUDENT = "stages.student"
_HOMES = {
    "CacheReader": "cache.reader",
    "CacheWriter": "cache.writer",
    "CachedSamples": "stages.training.batches",
    "CheckFailed": "cache.errors",
    "Engine": "stages.cache_log_probs",
    "LogProbFile": "stages.cache_log_probs",
    "MambaStudentConfig": _STUDENT,
    "MambaStudentForCausalLM": _STUDENT,
    "MambaStudentForSequenceClassification": _STUDENT,
    "SampleCollator": "stages.training.batches",
    "TeacherDistribution": "stages.losses.distributions",
    "UserError": "cache.errors",
    "cache_log_probs": "stages.cache_log_probs",
    "distillation_objective": "stages.losses.objective",
    "divergence": "stages.losses.divergences",
}

__all__ = [
    "CacheReader",
    "CacheWriter",
    "CachedSamples",
    "CheckFailed",
    "Engine",
    "LogProbFile",
    "MambaStudentConfig",
    "MambaStudentForCausalLM",
    "MambaStudentForSequenceClassification",
    "SampleCollator",
    "TeacherDistribution",
    "UserError",
    "cache_log_probs",
    "distillation_objective",
    "divergence",
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
