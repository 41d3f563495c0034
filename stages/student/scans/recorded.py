"""What a mixer's scans ran with, kept by reference: enough to write the scan as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scanned(NamedTuple):
    """A scan's output and where it ended.

    Attributes:
        y: one output per position; its shape is that of the scan's inputs.
        final_state: the state after the last position, a constant: no gradient flows through it.
    """

    y: Tensor
    final_state: Tensor


def plain_operators() -> bool:
    """Whether only operators that every runtime has may be called: torch.onnx is exporting."""
    return torch.onnx.is_in_onnx_export()


def step_sizes(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """Softplus of `dt` plus its bias, in float32 at least, as the kernels take it."""
    return F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + dt_bias)


@dataclass(frozen=True, kw_only=True)
class RecordedScan:
    """The very tensors that one scan was called with; nothing is computed to record them.

    Attributes:
        dt: [B, S, H] of Mamba-2, [B, S, D] of Mamba-1: step sizes before bias and softplus.
        dt_bias: [H] or [D].
        A: [H] of Mamba-2, [D, N] of Mamba-1: decay rates, not positive.
        B: [B, S, G, N] or [B, S, N] input maps.
        C: of B's shape, output maps.
        seq_idx: [B, S] integers, the state was reset wherever the value changes; or none.
    """

    dt: Tensor
    dt_bias: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    seq_idx: Tensor | None


@dataclass(frozen=True)
class RecordedMixer:
    """The scans of one mixer in one forward pass.

    Attributes:
        forwards: the scan of the rows.
        backwards: the scan of the reversed rows, of a bidirectional mixer.
        reversed_positions: [B, S] int64, where each position of the reversed rows comes from;
            with `backwards`, and only there.
    """

    forwards: RecordedScan
    backwards: RecordedScan | None = None
    reversed_positions: Tensor | None = None
