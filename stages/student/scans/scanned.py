"""What a scan returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scanned(NamedTuple):
    """A scan's output and where it ended.

    Attributes:
        y: one output per position; its shape is that of the scan's inputs.
        final_state: the state after the last position, a constant: no gradient flows through it.
    """

    y: Tensor
    final_state: Tensor
