"""Log-probs of given next tokens from a linear head, without the logits of all positions.

As in `linear_cross_entropy`, but each position's value stands by itself, for losses that join some
of them before they mean anything (the likelihood of a text of several tokens). What arrives from
above is known in the backward pass only, so a chunk's logits are computed there once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teacher_cache.stages.losses.linear_cross_entropy import MAX_LOGITS


def linear_next_log_probs(
    hidden: Tensor, weight: Tensor, next_ids: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Log-probs of the next tokens under `softmax(hidden @ weight.T)`.

    float32 or wider, under autocast too. The gradient cannot be differentiated again.

    Args:
        hidden: [N, D].
        weight: [V, D], a head without bias.
        next_ids: [N] int64 in 0..V-1.
        max_logits: logits that exist at a time; at least one position's are.

    Returns:
        [N] nats.

    Raises:
        ValueError: if the shapes disagree.
    """
    num, width = hidden.shape
    if weight.shape[1:] != (width,) or next_ids.shape != (num,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and next ids "
            f"{tuple(next_ids.shape)} are not [N, D], [V, D] and [N]"
        )
    size = max(1, max_logits // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return _NextLogProbs.apply(hidden, weight, next_ids, size)  # pyright: ignore[reportReturnType]  (a Tensor)


class _NextLogProbs(torch.autograd.Function):
    """A chunk of positions at a time, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, next_ids: Tensor, size: int) -> Tensor:
        """Keep the inputs alone."""
        ctx.save_for_backward(hidden, weight, next_ids)
        ctx.size = size
        head = weight.to(_wide(hidden, weight))
        found = [
            _log_probs(hidden[at], head).gather(1, next_ids[at, None])[:, 0]
            for at in _chunks(len(hidden), size)
        ]
        return torch.cat(found) if found else head.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """`grad (onehot - softmax)`, by head and states."""
        hidden, weight, next_ids = ctx.saved_tensors
        head = weight.to(_wide(hidden, weight))
        of_hidden = torch.zeros_like(hidden, dtype=head.dtype)
        of_weight = torch.zeros_like(head)
        for at in _chunks(len(hidden), ctx.size):
            gradient = _log_probs(hidden[at], head).exp_().neg_()
            gradient[torch.arange(len(gradient), device=gradient.device), next_ids[at]] += 1
            gradient *= grad_output[at, None]
            of_hidden[at] = gradient @ head
            of_weight.addmm_(gradient.T, hidden[at].to(head.dtype))
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None, None


def _chunks(num: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, num, size)]


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    return torch.log_softmax(hidden.to(head.dtype) @ head.T, dim=-1)
