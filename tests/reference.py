"""Slow, obvious float64 versions of what the project computes fast."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_scan_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Mamba-2's recurrence, one position after the other, in float64; arguments as `ssd_scan`'s.

    `A` may be [B, S, H] too, a rate of each position's own.

    Returns:
        [B, S, H, P] float64.
    """
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    batch, length, heads, width = x.shape
    per_group = heads // B.shape[2]
    B, C = (tensor.repeat_interleave(per_group, dim=2) for tensor in (B, C))  # [B, S, H, N]
    A = A.expand(batch, length, heads)
    state = x.new_zeros(batch, heads, width, B.shape[3])
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            kept = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(kept[:, None, None, None], state, torch.zeros_like(state))
        decay = torch.exp(dt[:, t] * A[:, t])[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y = (state * C[:, t, :, None, :]).sum(-1)
        outputs.append(y if D is None else y + D.double()[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def selective_scan_loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's recurrence, one position after the other, in float64; arguments as the scan's.

    Returns:
        The outputs [B, S, D] and the last state [B, D, N], float64.
    """
    x, dt, A, B, C = (tensor.double() for tensor in (x, dt, A, B, C))
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            kept = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(kept[:, None, None], state, torch.zeros_like(state))
        decay = torch.exp(dt[:, t, :, None] * A)
        state = state * decay + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y = (state * C[:, t, None, :]).sum(-1)
        outputs.append(y if D is None else y + D.double() * x[:, t])
    return torch.stack(outputs, dim=1), state
