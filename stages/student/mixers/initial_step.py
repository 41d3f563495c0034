"""The initial step sizes of both mixers, as mamba_ssm draws them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teacher_cache.stages.student.config import MambaStudentConfig


def inverse_softplus_steps(like: Tensor, config: MambaStudentConfig) -> Tensor:
    """Biases whose softplus is log-uniform between `dt_min` and `dt_max`, and above the floor.

    Args:
        like: gives shape, dtype and device.
        config: of the student.
    """
    dt = torch.empty_like(like).uniform_(math.log(config.dt_min), math.log(config.dt_max))
    dt = dt.exp_().clamp_(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))
