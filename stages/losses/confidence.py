"""How much the teacher's certainty counts."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_cache.stages.losses.teacher_distribution import widened


@torch.no_grad()
def confidence_weights(teacher_logits: Tensor, conf_power: float) -> Tensor:
    """Raw weights, `max_c p(c) ** conf_power` at T = 1, whatever the distillation temperature.

    Raw: the objective divides them by their mean over the optimizer step. At `conf_power` 0 every
    weight is 1, but a product with 1 and a division by a sum of ones need not give the same bits
    as no weighting, so callers skip the weighting instead of calling this.

    Args:
        teacher_logits: [..., C], before temperature.
        conf_power: at least 0.

    Returns:
        [...] in (0, 1], float32 or wider, without gradient.

    Raises:
        ValueError: if `conf_power` is negative.
    """
    top1_log_prob = torch.log_softmax(widened(teacher_logits), dim=-1).amax(dim=-1)
    return weights_of_top1(top1_log_prob, conf_power)


@torch.no_grad()
def weights_of_top1(top1_log_prob: Tensor, conf_power: float) -> Tensor:
    """The same from the cached log-prob of the teacher's most probable outcome, at T = 1.

    Args:
        top1_log_prob: [...] nats, of the full distribution; float16 as cached will do.
        conf_power: at least 0.

    Returns:
        [...] in (0, 1], float32 or wider, without gradient.

    Raises:
        ValueError: if `conf_power` is negative.
    """
    if conf_power < 0:
        raise ValueError(f"conf_power is {conf_power}, but must be at least 0")
    return (conf_power * widened(top1_log_prob)).exp()
