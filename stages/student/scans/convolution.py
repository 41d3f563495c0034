"""The short causal convolution per channel that comes before a Mamba scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Convolve each channel with the positions up to and including its own.

    Args:
        x: [B, S, D].
        weight: [D, 1, W]; the last tap weighs the position itself.
        bias: [D] or none.
        seq_idx: [B, S] integers, or none; taps do not reach across a change of value.
        initial_state: [B, W - 1, D] inputs before the first position; zeros if none.

    Returns:
        [B, S, D].
    """
    reach = weight.shape[-1] - 1
    if initial_state is not None:
        x = torch.cat([initial_state.to(x.dtype), x], dim=1)
        if seq_idx is not None:  # what came before belongs to the first position's sample
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, reach), seq_idx], dim=1)
        return causal_conv(x, weight, bias, seq_idx=seq_idx)[:, reach:]
    if seq_idx is None:
        # [B, D, 1, S] with channels last in memory: as 1d it is several times slower on a CPU.
        padded = F.pad(x, (0, 0, reach, 0)).transpose(1, 2).unsqueeze(2)
        return F.conv2d(padded, weight.unsqueeze(2), bias, groups=len(weight)).squeeze(2).mT
    segment = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)  # [B, S]
    taps = weight[:, 0].unbind(-1)
    y = x * taps[-1] if bias is None else x * taps[-1] + bias
    for distance, tap in enumerate(reversed(taps[:-1]), start=1):
        reached = F.pad(segment, (distance, 0), value=-1)[:, :-distance] == segment
        y = y + F.pad(x, (0, 0, distance, 0))[:, :-distance] * reached[..., None] * tap
    return y
