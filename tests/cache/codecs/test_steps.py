from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.ids import id_fields, pack_ids, unpack_ids
from teacher_cache.cache.codecs.steps import decode_steps, encode_steps
from tests.reference_codecs import log_softmax, realistic_logits


@st.composite
def _heads(draw: st.DrawFn) -> np.ndarray:
    num_slots = draw(st.integers(1, 12))
    gaps = draw(
        st.lists(st.floats(0, 30, width=32), min_size=num_slots - 1, max_size=num_slots - 1)
    )
    num_excluded = draw(st.integers(0, num_slots - 1))
    head = -np.cumsum([0.0, *gaps]).astype(np.float32)
    head[num_slots - num_excluded :] = -np.inf
    return head[None]


@settings(max_examples=100)
@given(_heads())
def test_steps_stay_within_half_a_step_and_are_equal_everywhere(head: np.ndarray) -> None:
    codes, widest = encode_steps(head)
    found = decode_steps(codes, widest)
    assert (codes.dtype, widest.dtype) == (np.uint8, np.float16)
    on_torch = decode_steps(torch.from_numpy(codes), torch.from_numpy(widest))
    assert found.tobytes() == on_torch.numpy().tobytes()
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(head))
    kept = ~np.isneginf(head[0])
    assert found[0, 0] == 0
    assert (np.diff(found[0, kept]) <= 0).all()
    # Half of the widest step, wherever it stands: no error is carried on.
    bound = float(widest[0]) / 254 + 1e-6
    assert np.abs(found[0, kept] - head[0, kept]).max() <= bound


@settings(max_examples=50)
@given(_heads())
def test_rounded_by_chance_is_right_in_the_mean(head: np.ndarray) -> None:
    """A whole step off at most; in the mean as far as none below was taken for one above."""
    many = np.repeat(head, 2000, axis=0)
    chances = np.random.default_rng(0).random(many.shape)
    codes, widest = encode_steps(many, dither=chances)
    found = decode_steps(codes, widest)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(many))
    kept = ~np.isneginf(head[0])
    step = 2 * float(widest[0]) / 254 + 1e-6
    assert np.abs(found[:, kept] - head[0, kept]).max() <= step
    gaps = -np.diff(head[0, kept])
    if (gaps > step).all():
        off = found[:, kept].mean(0) - head[0, kept]
        assert np.abs(off).max() <= 5 * step / 2 / np.sqrt(2000)


def test_equal_gaps_do_not_add_up_their_rounding() -> None:
    head = -np.arange(60, dtype=np.float32)[None] * np.float32(1.0004)  # f16 would round it to 1
    found = decode_steps(*encode_steps(head))
    assert np.abs(found - head).max() < 1 / 254


def test_the_largest_gap_is_as_exact_as_its_range() -> None:
    codes, widest = encode_steps(np.array([[0.0, -5.0, -5.5, -5.5, -6.0]], np.float32))
    assert widest[0] == 5
    assert codes[0, :2].tolist() == [0, 254]
    np.testing.assert_allclose(
        decode_steps(codes, widest)[0], [0, -5, -5.5, -5.5, -6], rtol=0, atol=0.01
    )


@pytest.mark.parametrize("head", [[[0.0]], [[0.0, 0.0, 0.0]], [[0.0, -1e30]], [[0.0, -1e-9]]])
def test_extreme_heads(head: list[list[float]]) -> None:
    codes, widest = encode_steps(np.array(head, np.float32))
    found = decode_steps(codes, widest)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found), np.exp(np.array(head)), rtol=1e-6)


def test_no_positions() -> None:
    codes, widest = encode_steps(np.zeros((0, 5), np.float32))
    assert decode_steps(codes, widest).shape == (0, 5)


def test_gaps_lose_less_than_steps_below_the_maximum() -> None:
    """Why this coding: equal and square-root steps of the same bytes, on the same heads."""
    heads = np.sort(realistic_logits(200, 3000), axis=-1)[:, ::-1][:, :64].astype(np.float64)
    heads -= heads[:, :1]
    lowest = heads[:, -1:]
    shares = heads / lowest
    ways = {
        "gaps": decode_steps(*encode_steps(heads.astype(np.float32))),
        "equal": np.rint(shares * 255) / 255 * lowest,
        "square root": (np.rint(np.sqrt(shares) * 255) / 255) ** 2 * lowest,
    }
    exact = log_softmax(heads)
    kl = {
        name: float((np.exp(exact) * (exact - log_softmax(one))).sum(-1).mean())
        for name, one in ways.items()
    }
    assert 0 < kl["gaps"] < 2e-6
    assert kl["gaps"] * 4 < min(kl["equal"], kl["square root"])


@settings(max_examples=100)
@given(
    support_size=st.sampled_from([1, 50_257, 65_536, 65_537, 151_936, 262_144, 262_145]),
    num_slots=st.integers(1, 9),
    num=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_ids_survive(support_size: int, num_slots: int, num: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(support_size, size=(num, num_slots))
    if num:
        ids[0, -1] = support_size - 1
    stored = pack_ids("x", ids, support_size)
    specs = id_fields("x", support_size, ("S", num_slots), ("S", -(-num_slots // 4)))
    assert {spec.name: (spec.dtype, spec.inner_shape) for spec in specs} == {
        name: (one.dtype.name, one.shape[1:]) for name, one in stored.items()
    }
    bytes_each = sum(one.nbytes for one in stored.values()) / max(num, 1)
    plane = -(-num_slots // 4) if 65_536 < support_size <= 262_144 else 0
    assert bytes_each == (num > 0) * (num_slots * (2 if support_size <= 262_144 else 4) + plane)
    for as_array in (lambda one: one, torch.from_numpy):
        packed = {name: as_array(one) for name, one in stored.items()}
        found = unpack_ids(packed["x"], packed.get("x_high"))
        assert np.array_equal(np.asarray(found), ids)


def test_an_id_outside_the_support_is_refused() -> None:
    with pytest.raises(ValueError, match="ids from 3 to 10, the support has 10"):
        pack_ids("x", np.array([3, 10]), 10)
