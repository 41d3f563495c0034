"""Packed sequences as rows of their own: nothing lost, nothing mixed, little padding."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.stages.student.scans.unpacking import group_sizes, lay_end_to_end, plan_rows


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60))
def test_groups_are_few_and_at_most_half_padding(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    sizes = group_sizes(lengths)
    assert sum(sizes) == len(lengths) and min(sizes) > 0
    assert len(sizes) <= math.log2(lengths[0]) + 1
    for size in sizes:
        group, lengths = lengths[:size], lengths[size:]
        assert size * group[0] <= 2 * sum(group)


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from((0.05, 0.3, 0.9)), st.integers(0, 99))
def test_unpacked_and_put_back(batch: int, length: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The values come back after each change but one: only a change begins a sample.
    seq_idx = (torch.rand(batch, length, generator=generator) < share).cumsum(1) % 2
    sequences = torch.arange(batch * length * 2.0, requires_grad=True)
    sequences = sequences.view(batch, length, 2)
    plan = plan_rows(seq_idx)
    begins = (seq_idx[:, 1:] != seq_idx[:, :-1]).sum().item()
    assert (plan is None) == (begins == 0)
    if plan is None:
        return
    rows = [group.rows_of(sequences) for group in plan.groups]
    assert sum(len(group.padding) for group in plan.groups) == batch + begins
    for group, row in zip(plan.groups, rows, strict=True):
        steps = row[:, 1:, 0] - row[:, :-1, 0]  # neighbours stay neighbours; padding repeats
        assert torch.equal(steps, torch.where(group.padding[:, 1:], 0.0, 2.0))
        assert not group.padding[:, 0].any()
    assert torch.equal(lay_end_to_end(rows)[plan.places].view_as(sequences), sequences)

    ends = torch.cat([g.source[:, -1] for g in plan.groups])[plan.last_rows]
    assert torch.equal(ends, torch.arange(1, batch + 1) * length - 1)
