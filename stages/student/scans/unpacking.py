"""Packed sequences as rows of their own, for a scan that cannot reset its state within a row.

Letters in shape comments: B batch, S sequence, R rows and L positions per row of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Group(NamedTuple):
    """Samples of similar lengths, one a row, padded on the right.

    Attributes:
        source: [R, L] int64, which position of the batch, counted through, lies here; padding
            repeats its row's last, so that many additions of (zero) gradient do not meet in one
            place.
        padding: [R, L] bool, True behind a row's sample.
    """

    source: Tensor
    padding: Tensor

    def rows_of(self, tensor: Tensor) -> Tensor:
        """[B, S, ...] as [R, L, ...]; differentiable."""
        rows = tensor.flatten(0, 1).index_select(0, self.source.flatten())
        return rows.unflatten(0, self.source.shape)


class Plan(NamedTuple):
    """How a batch is unpacked and put back.

    Attributes:
        groups: longest samples first.
        places: [B * S] int64, where each position lies in the groups laid end to end.
        last_rows: [B] int64, the row, counted through all groups, of a sequence's last sample.
    """

    groups: list[Group]
    places: Tensor
    last_rows: Tensor


def lay_end_to_end(groups: Sequence[Tensor]) -> Tensor:
    """Each group's [R, L, ...] as one [sum of R * L, ...]; `Plan.places` points into it."""
    return torch.cat([rows.flatten(0, 1) for rows in groups])


def plan_rows(seq_idx: Tensor) -> Plan | None:
    """Plan the unpacking of a batch; waits for the device once, as groups are made on the host.

    Args:
        seq_idx: [B, S] integers; a new sample begins wherever the value changes along S.

    Returns:
        The plan, or none where every sequence is one sample.
    """
    batch, length = seq_idx.shape
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True).flatten()  # [B * S]
    starts: list[int] = begins.nonzero()[:, 0].tolist()
    if len(starts) == batch:
        return None
    ends = [*starts[1:], batch * length]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    by_length = sorted(range(len(starts)), key=lambda sample: -lengths[sample])

    groups, row_of, first_place_of = [], [0] * len(starts), [0] * len(starts)
    row = place = 0
    for size in group_sizes([lengths[sample] for sample in by_length]):
        samples = by_length[row : row + size]
        longest = lengths[samples[0]]
        for sample in samples:
            row_of[sample], first_place_of[sample] = row, place
            row, place = row + 1, place + longest
        corners = [[starts[sample], lengths[sample]] for sample in samples]
        groups.append(_group(torch.tensor(corners, device=seq_idx.device), longest))

    table = torch.tensor([starts, first_place_of, row_of], device=seq_idx.device)
    sample_at = begins.cumsum(0) - 1  # [B * S]
    offset = torch.arange(batch * length, device=seq_idx.device) - table[0][sample_at]
    places = table[1][sample_at] + offset
    last_rows = table[2][sample_at.view(batch, length)[:, -1]]
    return Plan(groups, places, last_rows)


def group_sizes(lengths: Sequence[int]) -> list[int]:
    """Cut samples into groups: one closes before its padding would exceed its positions.

    So at most half of what is scanned is padding, and as a new group's longest sample is at most
    half as long as the one before's, groups are few: no more than log2 of the longest, and one.

    Args:
        lengths: in positions, longest first.

    Returns:
        Samples per group, in the same order.
    """
    sizes: list[int] = []
    longest = positions = 0
    for length in lengths:
        if sizes and longest * (sizes[-1] + 1) <= 2 * (positions + length):
            sizes[-1] += 1
            positions += length
        else:
            sizes.append(1)
            longest = positions = length
    return sizes


def _group(corners: Tensor, longest: int) -> Group:
    """The group of samples at `corners` [R, 2]: first position and length."""
    starts, lengths = corners[:, :1], corners[:, 1:]
    offset = torch.arange(longest, device=corners.device)[None]  # [1, L]
    return Group(starts + torch.minimum(offset, lengths - 1), offset >= lengths)
