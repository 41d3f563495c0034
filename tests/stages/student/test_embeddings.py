"""Embeddings from the teacher's, against a plain SVD and what must hold of any cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher_cache.stages.training.start import from_teacher, side_by_side


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(*shape, generator=generator, dtype=torch.float64)


TABLE = normal(40, 12) * torch.linspace(3, 0.1, 12) + 0.5  # singular values apart, a common part
FRESH = normal(40, 5, seed=1, std=0.02)


def similarities(rows: Tensor) -> Tensor:
    return rows @ rows.T


@pytest.mark.parametrize("width", [1, 5, 12])
def test_it_is_the_truncated_svd_up_to_one_factor(width: int) -> None:
    fresh = normal(40, width, seed=1, std=0.02)
    made = from_teacher(fresh, TABLE)
    u, s, vh = torch.linalg.svd(TABLE, full_matrices=False)
    assert made.energy_kept == pytest.approx(float((s[:width] ** 2).sum() / (s**2).sum()))
    expected = u[:, :width] * s[:width]
    signs = torch.stack([row[row.abs().argmax()].sign() for row in vh[:width]])
    factor = fresh.square().mean().sqrt() / expected.square().mean().sqrt()
    torch.testing.assert_close(made.rows, factor * expected * signs, rtol=1e-9, atol=1e-12)
    assert made.rows.square().mean().sqrt() == pytest.approx(float(fresh.square().mean().sqrt()))


def test_in_the_teachers_width_nothing_but_the_scale_is_lost() -> None:
    made = from_teacher(normal(40, 12, seed=1, std=0.02), TABLE)
    assert made.energy_kept == pytest.approx(1)
    ratio = similarities(made.rows) / similarities(TABLE)
    torch.testing.assert_close(ratio, ratio[0, 0].expand(40, 40), rtol=1e-8, atol=0)


def test_signs_and_stored_precision_do_not_turn_it() -> None:
    made = from_teacher(FRESH, TABLE).rows
    assert torch.equal(from_teacher(FRESH, TABLE.clone()).rows, made)
    halved = from_teacher(FRESH, TABLE.half()).rows
    torch.testing.assert_close(halved, made, rtol=0, atol=1e-4)
    # Turned and mirrored coordinates are the same geometry, whatever the signs.
    turned = from_teacher(FRESH, -TABLE.flip(1)).rows
    torch.testing.assert_close(similarities(turned), similarities(made), rtol=0, atol=1e-9)


def test_what_the_teacher_does_not_know_stays_fresh() -> None:
    table = TABLE[:30].clone()
    table[7] = 0
    fresh = normal(40, 16, seed=1, std=0.02)
    made = from_teacher(fresh, table).rows
    assert torch.equal(made[30:], fresh[30:])  # ids beyond the table
    assert torch.equal(made[7], fresh[7])  # a row that holds nothing
    assert torch.equal(made[:, 12:], fresh[:, 12:])  # columns beyond the teacher's width
    known = [row for row in range(30) if row != 7]
    assert (made[known, :12] != fresh[known, :12]).all()
    rms = float(fresh.square().mean().sqrt())
    assert made[known, :12].square().mean().sqrt() == pytest.approx(rms)


def test_rows_that_the_student_has_no_id_for_change_nothing() -> None:
    longer = torch.cat([TABLE, 100 * normal(9, 12, seed=2)])
    assert torch.equal(from_teacher(FRESH, longer).rows, from_teacher(FRESH, TABLE).rows)


def test_the_students_number_format_and_the_fresh_rows_are_kept() -> None:
    fresh = FRESH.float()
    before = fresh.clone()
    assert from_teacher(fresh, TABLE.half()).rows.dtype == torch.float32
    assert torch.equal(fresh, before)


def test_a_table_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="zeros"):
        from_teacher(FRESH, torch.zeros(40, 12))


def test_tables_side_by_side_count_alike_and_states_are_centred() -> None:
    states = 7 * normal(43, 6, seed=3) + 5
    states[4] = 0
    made = side_by_side(TABLE, states)
    assert made.shape == (43, 18)
    known = [row for row in range(43) if row != 4]
    for part, rows in ((made[:, :12], range(40)), (made[:, 12:], known)):
        assert part[list(rows)].square().sum(dim=1).mean() == pytest.approx(1)
    ratio = made[:40, :12] / TABLE
    torch.testing.assert_close(ratio, ratio[0, 0].expand(40, 12), rtol=1e-12, atol=0)
    assert not made[40:, :12].any() and not made[4, 12:].any()
    centred = states[known] - states[known].mean(dim=0)
    ratio = made[known, 12:] / centred
    torch.testing.assert_close(ratio, ratio[0, 0].expand(42, 6), rtol=1e-9, atol=0)


def test_a_shift_of_all_states_changes_nothing() -> None:
    states = normal(40, 6, seed=3)
    moved = side_by_side(TABLE, states + 9)
    torch.testing.assert_close(moved, side_by_side(TABLE, states), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("states", "complaint"),
    [(torch.zeros(40, 6), "zeros"), (torch.ones(39, 6), "39 rows of states for 40")],
)
def test_states_that_say_nothing_are_refused(states: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        side_by_side(TABLE, states)
