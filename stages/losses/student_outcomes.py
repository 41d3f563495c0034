"""The student's log-probs of the outcomes that a teacher names: a head, and the rest as one.

The ghost token's is a logsumexp over the complement of the head less the one over everything,
never `log(1 - sum q)`, which cancels: at a tail of 1e-8 it has no correct digit in float32, and its
gradient none either. Autograd would keep four copies of [..., V] for this; written out by hand it
needs one in the forward pass, none in between and one, the gradient itself, in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teacher_cache.stages.losses.teacher_distribution import widened


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
