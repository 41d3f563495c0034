"""RMS normalisation, with and without Mamba-2's gate, and a backward of few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from teacher_cache.stages.student.scans.recorded import plain_operators


class LayerNorm(nn.LayerNorm):
    """Of the last dimension, in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [..., D], in the weight's dtype."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        normed = F.layer_norm(
            input.to(dtype),
            self.normalized_shape,
            self.weight.to(dtype),
            self.bias.to(dtype),
            self.eps,
        )
        return normed.to(self.weight.dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension, times a weight; in float32.

    Args:
        size: D, the last dimension.
        epsilon: added to the mean square.
        num_groups: G, equal parts of the last dimension that are each divided by their own.
    """

    def __init__(self, size: int, *, epsilon: float = 1e-5, num_groups: int = 1) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        """Start as the plain norm."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise `x`, or `x * silu(gate)` where a gate is given (Mamba-2's order).

        Args:
            x: [..., D].
            gate: [..., D], before its SiLU, or none.

        Returns:
            [..., D] in the weight's dtype.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        gate = None if gate is None else gate.to(dtype)
        normalize = _normalized if plain_operators() else _RMSNorm.apply
        if self.num_groups == 1:
            normed = normalize(x, gate, weight, self.epsilon)
        else:
            groups = (self.num_groups, -1)
            gate = None if gate is None else gate.unflatten(-1, groups)
            normed = normalize(
                x.unflatten(-1, groups), gate, weight.unflatten(-1, groups), self.epsilon
            ).flatten(-2)
        return normed.to(self.weight.dtype)


def _normalized(x: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """The norm in plain operators."""
    gated = x if gate is None else x * F.silu(gate)
    return gated * (gated.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


class _RMSNorm(torch.autograd.Function):
    """On a CPU twice as fast, forward and backward, as the same under autograd.

    The weight is [D] or, for groups, [G, D / G]; the last dimension is normalised.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        gated = x if gate is None else x * F.silu(gate)
        scale = gated.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, gate, weight, scale)
        return (gated * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scale = ctx.saved_tensors
        (grad,) = grads
        activated = None if gate is None else F.silu(gate)
        normed = (x if activated is None else x * activated).mul(scale)
        products = grad * normed
        grad_weight = products.flatten(0, -weight.ndim - 1).sum(0)
        dots = products @ weight if weight.ndim == 1 else (products * weight).sum(-1)
        projection = dots.div_(weight.shape[-1]).unsqueeze(-1)
        # d x_hat / d x = scale (I - x_hat x_hat^T / D)
        grad_gated = torch.mul(grad, weight, out=products).sub_(normed.mul_(projection))
        grad_gated.mul_(scale)
        if gate is None or activated is None:
            return grad_gated, None, grad_weight, None
        grad_gate = torch.ops.aten.silu_backward(torch.mul(grad_gated, x, out=normed), gate)
        return grad_gated.mul_(activated), grad_gate, grad_weight, None
