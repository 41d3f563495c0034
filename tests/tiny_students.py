"""Small students and mixers with fresh weights."""

from __future__ import annotations

from typing import Any

import torch

from teacher_cache.stages.student import (
    MambaStudentConfig,
    MambaStudentForSequenceClassification,
    build_student,
)
from teacher_cache.stages.student.mixers import Mamba, Mamba2

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "num_layers": 2,
    "head_dim": 12,
    "d_state": 4,
}
SMALL_MIXER: dict[str, Any] = {
    "vocab_size": 4,
    "d_model": 8,
    "num_layers": 1,
    "expand": 2,
    "d_state": 3,
    "head_dim": 4,
    "chunk_size": 16,
}


def small_config(**changes: Any) -> MambaStudentConfig:
    """Two layers of width 16 over 50 tokens."""
    return MambaStudentConfig(**(SMALL | changes))


def small_student(**changes: Any) -> MambaStudentForSequenceClassification:
    """A classifier of `small_config`, in evaluation mode."""
    return build_student(small_config(**changes), seed=0).eval()


def started_mixer(arch: str, **changes: Any) -> Mamba | Mamba2:
    """The first mixer of a default student."""
    settings: dict[str, Any] = {"arch": arch, "vocab_size": 4} | changes
    config = MambaStudentConfig(**settings)
    mixer = build_student(config, seed=0).backbone.get_submodule("layers.0.mixer")
    assert isinstance(mixer, Mamba | Mamba2)
    return mixer


def small_mixer(arch: str, **changes: Any) -> Mamba | Mamba2:
    """A mixer of width 8 in float64, with what starts as a constant drawn at random."""
    mixer = started_mixer(arch, **(SMALL_MIXER | changes)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise
    return mixer
