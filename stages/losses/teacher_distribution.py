"""What a divergence needs to know of the teacher: log-probs at a temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: sums of log-probs lose too much below that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class TeacherDistribution:
    """A teacher's distribution over every outcome, at one temperature.

    This is the dense case: the head is everything, so nothing is left for a tail. A divergence
    takes the student's raw logits and one of these, and reads the temperature here, so that the
    two sides cannot be compared at different ones.

    Attributes:
        log_probs: [..., C] nats, float32 or wider, summing to 1 along C; -inf where the teacher
            rules an outcome out.
        temperature: what the logits were divided by.
    """

    log_probs: Tensor
    temperature: float

    @classmethod
    def from_logits(cls, logits: Tensor, temperature: float) -> TeacherDistribution:
        """Soften logits and normalise them in log space.

        Args:
            logits: [..., C], before temperature; -inf excludes an outcome.
            temperature: positive.

        Raises:
            ValueError: if `temperature` is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, but must be positive")
        log_probs = torch.log_softmax(widened(logits) / temperature, dim=-1)
        return cls(log_probs=log_probs, temperature=temperature)
