"""Cross-entropy of a linear head over a large vocabulary, without the logits of all positions.

The logits of a batch are [N, V]: 2 GB for 16,384 positions and 30,522 ids in float32, and twice
that with their gradient. Here a chunk of positions at a time gets its logits, its loss and its
gradients, in the forward pass, and its logits are dropped; the backward pass only multiplies by
what arrives from above (Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**24
"""Logits that exist at a time: 64 MB in float32, and as much again for a temporary copy."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` to the targets.

    Logits and sums are float32 or wider, under autocast too. Beside the inputs, memory holds one
    chunk of logits with a temporary copy, and a gradient of the size of each input. The gradient
    cannot be differentiated again.

    Args:
        hidden: [N, D].
        weight: [V, D], a head without bias.
        targets: [N] int64 in 0..V-1.
        max_logits: logits that exist at a time; at least one position's are.

    Returns:
        Scalar in nats, float32 or wider; 0 for N = 0.

    Raises:
        ValueError: if the shapes disagree.
    """
    num, width = hidden.shape
    if weight.shape[1:] != (width,) or targets.shape != (num,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} are not [N, D], [V, D] and [N]"
        )
    chunk_size = max(1, max_logits // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        # Without gradients (in evaluation) `apply` would compute them all the same.
        if not torch.is_grad_enabled():
            return _loss_and_gradients(hidden, weight, targets, chunk_size, (False, False))[0]
        return _LinearCrossEntropy.apply(hidden, weight, targets, chunk_size)  # pyright: ignore[reportReturnType]  (a Tensor)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum, with gradients that are computed beside it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
        """Keep the gradients for `backward`."""
        needed = ctx.needs_input_grad[:2]
        loss, *gradients = _loss_and_gradients(hidden, weight, targets, size, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale them by the gradient of the sum; rounded to the inputs' dtype only then."""
        scaled = [
            None if gradient is None else (grad_output * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum over all positions, and its gradients of `hidden` and `weight` where needed."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    head = weight.to(dtype)
    loss = hidden.new_zeros((), dtype=dtype)
    hidden_gradient = torch.zeros_like(hidden, dtype=dtype) if needed[0] else None
    weight_gradient = torch.zeros_like(head) if needed[1] else None
    for start in range(0, len(hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        states, wanted = hidden[chunk].to(dtype), targets[chunk, None]
        logits = states @ head.T  # [n, V]
        log_z = logits.logsumexp(dim=1, keepdim=True)  # [n, 1]
        loss += (log_z - logits.gather(1, wanted)).sum()
        if not any(needed):
            continue
        # d loss / d logits is the softmax, less 1 at the target; in the place of the logits.
        gradient = logits.sub_(log_z).exp_()
        gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))
        if hidden_gradient is not None:
            hidden_gradient[chunk] = gradient @ head
        if weight_gradient is not None:
            weight_gradient.addmm_(gradient.T, states)
    return loss, hidden_gradient, weight_gradient
