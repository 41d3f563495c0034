"""What a divergence needs to know of the teacher: log-probs at a temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def dense_log_probs(
    student_logits: Tensor, temperature: float, support: Tensor | None = None
) -> Tensor:
    """Log-probs of every outcome, [..., V] nats; -inf outside the support.

    Args:
        student_logits: [..., V], before temperature; -inf excludes an outcome.
        temperature: what they are divided by.
        support: [V] bool, False for what is no outcome at all (padded embedding rows).
    """
    logits = widened(student_logits)
    if support is not None:
        logits = logits.masked_fill(~support, -torch.inf)
    return torch.log_softmax(logits / temperature, dim=-1)


def head_log_probs(
    student_logits: Tensor,
    head_ids: Tensor,
    temperature: float,
    support: Tensor | None = None,
) -> Tensor:
    """Log-probs of a head's outcomes and, last, of all others together (the ghost token).

    The gradient cannot be differentiated again.

    Args:
        student_logits: [..., V], before temperature; -inf excludes an outcome.
        head_ids: [..., K] int64 in 0..V-1, distinct along K; -1 for an empty slot.
        temperature: what the logits are divided by.
        support: [V] bool, False for what is no outcome at all (padded embedding rows).

    Returns:
        [..., K+1] nats, float32 or wider; -inf in empty slots, outside the support, and for a
        ghost token of nothing, none of which gets or gives a gradient.
    """
    return _HeadLogProbs.apply(student_logits, head_ids, temperature, support)  # pyright: ignore[reportReturnType]  (a Tensor)


class _HeadLogProbs(torch.autograd.Function):
    """With `h_i = s_i/T` and `t = logsumexp of s/T outside the head`: both less their logsumexp."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, support: Tensor | None
    ) -> Tensor:
        """Keep what is of the head's size beside the logits themselves."""
        scaled, slots = _scaled(logits, ids, temperature, support)  # [..., V+1]
        head = scaled.gather(-1, slots)  # [..., K]
        tail = _logsumexp_(scaled.scatter_(-1, slots, -torch.inf))  # [..., 1]
        log_z = torch.logaddexp(head.logsumexp(dim=-1, keepdim=True), tail)
        log_q = torch.cat([head, tail], dim=-1) - log_z  # [..., K+1]
        ctx.save_for_backward(logits, ids, support, tail, log_q)
        ctx.temperature = temperature
        return log_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The softmax over head and ghost first, then the ghost's share within the tail."""
        logits, ids, support, tail, log_q = ctx.saved_tensors
        inner = grad_output - grad_output.sum(dim=-1, keepdim=True) * log_q.exp()  # [..., K+1]
        scaled, slots = _scaled(logits, ids, ctx.temperature, support)
        scaled.scatter_(-1, slots, -torch.inf)
        # A ghost of nothing: exp(-inf - 0) is 0, exp(-inf - -inf) would be NaN.
        finite_tail = torch.where(tail == -torch.inf, 0.0, tail)
        gradient = scaled.sub_(finite_tail).exp_().mul_(inner[..., -1:])
        gradient.scatter_(-1, slots, inner[..., :-1])
        gradient = gradient[..., :-1]  # [..., V]: what went to the empty slots' column is dropped
        if support is not None:
            gradient = gradient.masked_fill_(~support, 0.0)
        return gradient.div_(ctx.temperature).to(logits.dtype), None, None, None


def _scaled(
    logits: Tensor, ids: Tensor, temperature: float, support: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits over T with one excluded outcome more, [..., V+1], and ids whose empty slots mean it.

    Without that column an empty slot would have to point at a real outcome.
    """
    num = logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.new_empty((*logits.shape[:-1], num + 1), dtype=dtype)
    scaled[..., :-1] = logits
    scaled.div_(temperature)
    if support is not None:
        scaled[..., :-1].masked_fill_(~support, -torch.inf)
    scaled[..., -1] = -torch.inf
    return scaled, torch.where(ids < 0, num, ids)


def _logsumexp_(tensor: Tensor) -> Tensor:
    """[..., 1]; uses up its argument, where torch's would make a copy. -inf of nothing but -inf."""
    top = tensor.amax(dim=-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    return tensor.sub_(top).exp_().sum(dim=-1, keepdim=True).log_().add_(top)
