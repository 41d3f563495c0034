"""Initial values that both mixers share, as mamba_ssm draws them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

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


def reset_output_projection(projection: nn.Linear, config: MambaStudentConfig) -> None:
    """As torch starts a linear map, over the root of the number of layers that add to one residual.

    Args:
        projection: from the inner width.
        config: of the student.
    """
    bound = 1 / math.sqrt(config.d_inner * config.num_layers)
    init.uniform_(projection.weight, -bound, bound)
