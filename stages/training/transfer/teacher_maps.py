"""A teacher's attention maps where the student's positions are.

First both axes are reordered by the student's `position_map`, then a causal student's part is cut
out and each row normalised: so the teacher's CLS row, which goes last, loses nothing. A token that
the student appends has neither row nor column.

Letters in shape comments: B batch, S the teacher's positions, S' the student's, R rows, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teacher_cache.stages.losses.layers import normalised_rows
from teacher_cache.stages.student.position_map import PositionMap

Decode = Callable[[Tensor, Tensor], Tensor]
"""From stored entries [..., n] and what each row reaches, [..., n] bool, to rows that sum to 1."""


def pooled_rows(sources: Tensor, position_map: PositionMap) -> Tensor:
    """The student's position that the class is read from: the last real one, [B, 1] int64.

    Args:
        sources: [B, S'] of `position_map`.
        position_map: an appended token is the last one.
    """
    last_mapped = (sources >= 0).sum(dim=1, keepdim=True) - 1
    return last_mapped if position_map.token_id is None else last_mapped + 1


def allowed_pairs(
    sources: Tensor, rows: Tensor, *, is_causal: bool, seq_idx: Tensor | None = None
) -> Tensor:
    """Which entries of the student's map have a counterpart in the teacher's.

    Args:
        sources: [B, S'] where each position comes from; negative: nowhere.
        rows: [B, R] int64, the student's positions whose rows are matched.
        is_causal: whether the student sees nothing behind a position.
        seq_idx: [B, S'] document of each position, or none; no pair crosses a border.

    Returns:
        [B, R, S'] bool.
    """
    exists = sources >= 0
    allowed = exists[:, None].expand(-1, rows.shape[1], -1)
    if is_causal:
        allowed = allowed & (torch.arange(sources.shape[1], device=rows.device) <= rows[..., None])
    if seq_idx is not None:
        allowed = allowed & (seq_idx.gather(1, rows)[..., None] == seq_idx[:, None])
    return allowed


def reordered(maps: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    """A batch of square maps with both axes in the student's order, some rows of it.

    Args:
        maps: [B, S, S] or [B, H, S, S], whatever they are stored as.
        sources: [B, S'].
        rows: [B, R] int64, the student's positions.

    Returns:
        [B, R, S'] or [B, H, R, S']; what stands where a source is negative means nothing.
    """
    of_rows, of_columns = sources.gather(1, rows).clamp(min=0), sources.clamp(min=0)
    batch = torch.arange(len(maps), device=maps.device)[:, None, None]
    index = (batch, of_rows[:, :, None], of_columns[:, None])
    if maps.ndim == 3:
        return maps[index]
    return maps.movedim(1, -1)[index].movedim(-1, 1)


def targets(
    stored: Tensor,
    sources: Tensor,
    rows: Tensor,
    allowed: Tensor,
    *,
    decode: Decode,
    teacher_is_causal: bool,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The teacher's rows as the student is to match them.

    Args:
        stored: [B, S, S] the mean over heads, [B, H, S, S] all of them, or [B, S] the row of the
            position that the teacher's class is read from.
        sources: [B, S'].
        rows: [B, R] int64, the student's positions; R is 1 for stored [B, S].
        allowed: [B, R, S'] bool, of `allowed_pairs`.
        decode: of what is stored.
        teacher_is_causal: whether the teacher looks at nothing behind a position.
        seq_idx: [B, S'] document of each position, or none; the teacher crosses no border.

    Returns:
        [B, R, S'] float32; a row sums to 1 over `allowed`, or is 0 where nothing of it is left or
        the teacher has no such row.
    """
    if stored.ndim == 2:
        row = stored.gather(1, sources.clamp(min=0))[:, None]  # [B, 1, S']
        return normalised_rows(decode(row, (sources >= 0)[:, None]), allowed)
    of_rows = sources.gather(1, rows)[..., None]  # [B, R, 1]
    reach = (of_rows >= 0) & (sources >= 0)[:, None]
    if teacher_is_causal:
        reach = reach & (sources[:, None] <= of_rows)
    if seq_idx is not None:
        reach = reach & (seq_idx.gather(1, rows)[..., None] == seq_idx[:, None])
    maps = reordered(stored, sources, rows)
    if stored.ndim == 4:  # the mean over heads first, as if it had been stored
        return normalised_rows(decode(maps, reach[:, None].expand(maps.shape)).mean(1), allowed)
    return normalised_rows(decode(maps, reach), allowed)
