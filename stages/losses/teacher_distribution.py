"""What a divergence needs to know of the teacher: log-probs at a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: sums of log-probs lose too much below that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class TeacherDistribution:
    """A teacher's distribution at one temperature: a head of outcomes, and the rest as one.

    A dense one is a head that is everything: no ids, all V outcomes in their order, and no tail.
    A divergence takes the student's raw logits and one of these, and reads the temperature here,
    so that the two sides cannot be compared at different ones.

    Attributes:
        log_probs: [..., K] nats, float32 or wider; -inf where the teacher rules an outcome out.
            Together with the tail they sum to 1 along K.
        temperature: what the logits were divided by.
        head_ids: [..., K] int64, the outcomes that `log_probs` are of, distinct along K; -1 is an
            empty slot of a ragged head, with log-prob -inf. None: dense.
        tail_log_prob: [...] nats, the log of the mass outside the head (the ghost token's); -inf
            where the head is the whole support. With `head_ids`, and only there.

    Raises:
        ValueError: if the shapes disagree, one of `head_ids` and `tail_log_prob` is missing, or
            `temperature` is not positive.
    """

    log_probs: Tensor
    temperature: float
    head_ids: Tensor | None = None
    tail_log_prob: Tensor | None = None

    def __post_init__(self) -> None:
        """A head without its tail, or of another shape, would be compared wrongly, not refused."""
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, but must be positive")
        if (self.head_ids is None) != (self.tail_log_prob is None):
            raise ValueError("a sparse teacher has head_ids and tail_log_prob, a dense one neither")
        if self.head_ids is not None and self.tail_log_prob is not None:
            shapes = [tuple(one.shape) for one in (self.head_ids, self.tail_log_prob)]
            if shapes != [tuple(self.log_probs.shape), tuple(self.log_probs.shape[:-1])]:
                raise ValueError(
                    f"head ids of shape {shapes[0]} and a tail of shape {shapes[1]} against "
                    f"log-probs of shape {tuple(self.log_probs.shape)}: [..., K], [...], [..., K]"
                )

    @classmethod
    def from_logits(cls, logits: Tensor, temperature: float) -> TeacherDistribution:
        """Soften logits and normalise them in log space.

        Args:
            logits: [..., V], before temperature; -inf excludes an outcome.
            temperature: positive.

        Raises:
            ValueError: if `temperature` is not positive.
        """
        log_probs = torch.log_softmax(widened(logits) / temperature, dim=-1)
        return cls(log_probs=log_probs, temperature=temperature)

    @property
    def outcome_log_probs(self) -> Tensor:
        """[..., V] of a dense one, else [..., K+1] with the ghost token last; nats."""
        if self.tail_log_prob is None:
            return self.log_probs
        return torch.cat([self.log_probs, self.tail_log_prob.unsqueeze(-1)], dim=-1)

    def top_ids(self) -> Tensor:
        """[...] int64, the most probable outcome of the head; -1 where the head is empty."""
        best = self.log_probs.argmax(dim=-1, keepdim=True)
        return (best if self.head_ids is None else self.head_ids.gather(-1, best)).squeeze(-1)

    def at_positions(self, where: Any) -> TeacherDistribution:
        """The same at a part of the positions; `where` indexes the dimensions before K."""
        return TeacherDistribution(
            log_probs=self.log_probs[where],
            temperature=self.temperature,
            head_ids=None if self.head_ids is None else self.head_ids[where],
            tail_log_prob=None if self.tail_log_prob is None else self.tail_log_prob[where],
        )
