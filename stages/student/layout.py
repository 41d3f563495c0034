"""What the mixers must know of a batch's rows besides their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where samples begin in a batch's rows, where padding stands, and how rows are reversed.

    Attributes:
        seq_idx: [B, S] integers that number the samples packed into a row, or none; nothing
            crosses a change of value.
        mask: [B, S] bool, False where a position neither enters a state nor lets it decay, or
            none. Padding on the right needs no mask: a causal mixer's earlier positions never
            see it.
        reversed_positions: [B, S] int64, where each position of the reversed rows comes from; none
            where no mixer runs backwards.
    """

    seq_idx: Tensor | None = None
    mask: Tensor | None = None
    reversed_positions: Tensor | None = None

    def reverse(self, rows: Tensor) -> Tensor:
        """The rows [B, S, ...] with their real part in reversed order; twice is the identity."""
        assert self.reversed_positions is not None, "this layout is of mixers that run forwards"
        index = self.reversed_positions
        return rows.gather(1, index.view(*index.shape, *[1] * (rows.ndim - 2)).expand_as(rows))

    def reversed(self) -> Layout:
        """The layout of the reversed rows."""
        return Layout(
            seq_idx=None if self.seq_idx is None else self.reverse(self.seq_idx),
            mask=None if self.mask is None else self.reverse(self.mask),
        )


def reversed_positions(mask: Tensor) -> Tensor:
    """The index that reverses each row's real positions among themselves and leaves the others.

    A flip of the whole row would move the padding, and a row's result would depend on it.

    Args:
        mask: [B, S] bool, True at real positions, wherever in the row they stand.

    Returns:
        [B, S] int64.
    """
    real_first = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    rank = mask.cumsum(dim=1)  # from 1, at real positions
    mirrored = real_first.gather(1, (rank[:, -1:] - rank).clamp(min=0, max=mask.shape[1] - 1))
    return torch.where(mask, mirrored, torch.arange(mask.shape[1], device=mask.device))
