"""A teacher's maps in the student's order, against one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.training.layers import (
    allowed_pairs,
    pooled_rows,
    targets,
)

MAPS = (
    PositionMap(),
    PositionMap(mode="move_first_to_last"),
    PositionMap(mode="append", token_id=99),
)
any_map = st.sampled_from(MAPS)
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def decode(stored: Tensor, reach: Tensor) -> Tensor:
    """Floats as they are, normalised over what is reached."""
    kept = torch.where(reach, stored.float(), 0)
    total = kept.sum(-1, keepdim=True)
    return kept / torch.where(total > 0, total, 1)


def batch_of(sizes: list[int], *, causal: bool) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """Random maps of samples of these lengths, padded with rubbish, and their mask."""
    rng = np.random.default_rng(0)
    width = max(sizes)
    maps: list[np.ndarray] = []
    padded = rng.random((len(sizes), width, width), np.float32)
    for row, size in enumerate(sizes):
        one = rng.random((size, size), np.float32) + 0.01
        one = np.tril(one) if causal else one
        maps.append(one / one.sum(1, keepdims=True))
        padded[row, :size, :size] = maps[-1]
    mask = torch.arange(width) < torch.tensor(sizes)[:, None]
    return maps, torch.from_numpy(padded), mask


def slow(one: np.ndarray, position_map: PositionMap, *, is_causal: bool) -> np.ndarray:
    """One sample's map: permute both axes, cut, divide each row by its sum."""
    source = position_map.source_positions(len(one))
    found = np.zeros((len(source), len(source)))
    for i, from_i in enumerate(source):
        for j, from_j in enumerate(source):
            if from_i >= 0 and from_j >= 0 and (j <= i or not is_causal):
                found[i, j] = one[from_i, from_j]
        if found[i].sum() > 0:
            found[i] /= found[i].sum()
    return found


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("teacher_is_causal", [False, True])
@given(position_map=any_map, sizes=lengths)
def test_a_batch_equals_its_samples_alone(
    position_map, sizes, teacher_is_causal, is_causal
) -> None:
    maps, stored, mask = batch_of(sizes, causal=teacher_is_causal)
    sources = position_map.sources(mask)
    rows = torch.arange(sources.shape[1]).expand_as(sources)
    allowed = allowed_pairs(sources, rows, is_causal=is_causal)
    found = targets(
        stored, sources, rows, allowed, decode=decode, teacher_is_causal=teacher_is_causal
    )
    for row, one in enumerate(maps):
        expected = np.zeros(found.shape[1:])
        alone = slow(one, position_map, is_causal=is_causal)
        expected[: len(alone), : len(alone)] = alone
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-6)
    assert (found[~allowed] == 0).all()


@given(sizes=lengths)
def test_the_cls_row_becomes_the_last_and_loses_nothing(sizes) -> None:
    position_map = PositionMap(mode="move_first_to_last")
    maps, stored, mask = batch_of(sizes, causal=False)
    sources = position_map.sources(mask)
    rows = pooled_rows(sources, position_map)
    allowed = allowed_pairs(sources, rows, is_causal=True)
    found = targets(stored, sources, rows, allowed, decode=decode, teacher_is_causal=False)
    for row, (one, size) in enumerate(zip(maps, sizes, strict=True)):
        assert int(rows[row]) == size - 1
        np.testing.assert_allclose(found[row, 0, :size], np.roll(one[0], -1), atol=1e-6)


@given(position_map=any_map, sizes=lengths)
def test_a_cached_pooled_row_goes_where_the_student_pools(position_map, sizes) -> None:
    maps, stored, mask = batch_of(sizes, causal=False)
    sources = position_map.sources(mask)
    rows = pooled_rows(sources, position_map)
    allowed = allowed_pairs(sources, rows, is_causal=True)
    found = targets(stored[:, 0], sources, rows, allowed, decode=decode, teacher_is_causal=False)
    for row, one in enumerate(maps):
        source = position_map.source_positions(len(one))
        assert int(rows[row]) == len(source) - 1
        expected = [one[0, j] if j >= 0 else 0 for j in source]
        np.testing.assert_allclose(found[row, 0, : len(source)], expected, atol=1e-6)
        assert (found[row, 0, len(source) :] == 0).all()


@given(position_map=any_map, sizes=lengths)
def test_all_heads_are_averaged_before_the_cut(position_map, sizes) -> None:
    _, first, mask = batch_of(sizes, causal=False)
    second = first.flip(1)
    sources = position_map.sources(mask)
    rows = torch.arange(sources.shape[1]).expand_as(sources)
    allowed = allowed_pairs(sources, rows, is_causal=True)

    def found(stored: Tensor) -> Tensor:
        return targets(stored, sources, rows, allowed, decode=decode, teacher_is_causal=False)

    real = (mask[:, :, None] & mask[:, None]).float()
    mean = (decode(first, real.bool()) + decode(second, real.bool())) / 2
    torch.testing.assert_close(found(torch.stack((first, second), 1)), found(mean))


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_crosses_a_border(is_causal: bool) -> None:
    _, stored, mask = batch_of([6], causal=False)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 0]])
    sources = PositionMap().sources(mask)
    rows = torch.arange(6)[None]
    allowed = allowed_pairs(sources, rows, is_causal=is_causal, seq_idx=seq_idx)
    found = targets(
        stored, sources, rows, allowed, decode=decode, teacher_is_causal=False, seq_idx=seq_idx
    )
    same = seq_idx[:, :, None] == seq_idx[:, None]
    assert (found[~same] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 6))


@given(position_map=any_map, sizes=lengths)
def test_sources_are_the_maps_own(position_map, sizes) -> None:
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    for row, found in enumerate(position_map.sources(mask).tolist()):
        expected = position_map.source_positions(sizes[row]).tolist()
        assert found == expected + [-1] * (len(found) - len(expected))
