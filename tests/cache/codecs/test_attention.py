"""Maps in a byte an entry, against loops over rows in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.attention import (
    AttentionCodec,
    attention_from,
    decode_rows,
    encode_rows,
    largest_kl,
    row_kl,
)
from teacher_cache.cache.errors import UserError


@st.composite
def _rows(draw: st.DrawFn) -> np.ndarray:
    """One row of probabilities, anything from flat to one-hot, some entries 0: [1, n] float32."""
    length = draw(st.integers(1, 40))
    spread = draw(st.sampled_from([0.0, 0.5, 5.0, 60.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = spread * rng.standard_normal(length)
    row = np.exp(logits - logits.max())
    row[rng.random(length) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    row[draw(st.integers(0, length - 1))] += 1e-3
    return (row / row.sum()).astype(np.float32)[None]


def decoded_by_hand(codes: list[int]) -> list[float]:
    weights = [code**2 + 1 / 12 for code in codes]
    return [weight / math.fsum(weights) for weight in weights]


def kl_by_hand(exact: np.ndarray, decoded: list[float]) -> float:
    total = math.fsum(exact.tolist())
    shares = [float(one) / total for one in exact]
    return math.fsum(p * math.log(p / q) for p, q in zip(shares, decoded, strict=True) if p > 0)


@settings(max_examples=150)
@given(_rows())
def test_rows_come_back_within_what_half_a_step_can_lose(rows: np.ndarray) -> None:
    codes = encode_rows(rows)
    assert codes.dtype == np.uint8 and codes.max() == 255
    exact_steps = [255 * math.sqrt(float(one) / float(rows.max())) for one in rows[0]]
    np.testing.assert_allclose(codes[0], exact_steps, rtol=0, atol=0.5 + 1e-4)
    found = decode_rows(codes, np.ones(rows.shape, bool))
    assert found.dtype == np.float32 and (found > 0).all()
    expected = decoded_by_hand(codes[0].tolist())
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    kl = kl_by_hand(rows[0], expected)
    assert kl <= largest_kl(rows)[0] + 1e-6
    np.testing.assert_allclose(row_kl(rows, found)[0], kl, rtol=1e-3, atol=1e-7)


@settings(max_examples=50)
@given(_rows())
def test_torch_and_numpy_give_the_same_bits(rows: np.ndarray) -> None:
    codes = encode_rows(rows)
    on_torch = encode_rows(torch.from_numpy(rows))
    assert on_torch.dtype == torch.uint8 and np.array_equal(on_torch.numpy(), codes)
    reach = np.arange(rows.shape[1])[None] <= rows.shape[1] // 2
    found = decode_rows(codes, reach)
    again = decode_rows(on_torch, torch.from_numpy(reach))
    np.testing.assert_allclose(again.numpy(), found, rtol=1e-6)
    assert (found[~reach] == 0).all()


def test_a_row_that_looks_at_nothing_is_zeros() -> None:
    codes = encode_rows(np.zeros((2, 3), np.float32))
    assert (codes == 0).all()
    assert (decode_rows(codes, np.zeros((2, 3), bool)) == 0).all()


def test_a_decoded_zero_below_more_is_an_infinite_kl() -> None:
    assert row_kl(np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]))[0] == np.inf
    assert row_kl(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]))[0] == pytest.approx(math.log(2))


def maps(rng: np.random.Generator, num_heads: int, length: int, is_causal: bool) -> np.ndarray:
    """[H, n, n] float32, each row a distribution over what it may look at."""
    logits = 3 * rng.standard_normal((num_heads, length, length))
    if is_causal:
        logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True)).astype(np.float32)


def codec_of(mode: Any, is_causal: bool, is_packed: bool = False) -> AttentionCodec:
    return AttentionCodec(
        mode=mode,
        layers=(1, 3),
        num_heads=4,
        is_causal=is_causal,
        is_packed=is_packed,
        pooled_at="last" if mode == "cls" else None,
    )


def assert_same_codes(on_device: np.ndarray, on_host: np.ndarray, rows: np.ndarray) -> None:
    """Equal but for entries half way between two codes, which float32 rounds either way."""
    exact = rows.astype(np.float64)
    roots = 255 * np.sqrt(exact / exact.max(-1, keepdims=True))
    num_half_way = int((np.abs(roots % 1 - 0.5) < 1e-4).sum())
    apart = np.abs(on_device.astype(int) - on_host)
    assert apart.max() <= 1 and (apart > 0).sum() <= num_half_way


def test_half_way_between_two_codes() -> None:
    """A row of which numpy and torch round one entry to different codes."""
    codec = codec_of("full", False)
    heads = maps(np.random.default_rng(23), 4, 7, False)
    assert_same_codes(codec.encode(torch.from_numpy(heads)), codec.encode(heads), heads)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(["cls", "mean", "full"]),
    is_causal=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_maps_of_every_mode_come_back(
    mode: str, is_causal: bool, lengths: list[int], seed: int
) -> None:
    if mode == "cls" or not is_causal:
        lengths = lengths[:1]  # only causal teachers are packed, and those have no such row
    codec = codec_of(mode, is_causal, is_packed=len(lengths) > 1)
    rng = np.random.default_rng(seed)
    exact = []
    for length in lengths:
        heads = maps(rng, 4, length, is_causal)
        exact.append({"cls": heads.mean(0)[-1], "mean": heads.mean(0), "full": heads}[mode])
    stored = [codec.encode(one) for one in exact]
    for one, codes in zip(exact, stored, strict=True):
        assert_same_codes(codec.encode(torch.from_numpy(one)), codes, one)
    field = np.concatenate(stored)
    assert field.dtype == np.uint8 and 2 * field.nbytes == codec.num_bytes(lengths)
    assert [spec.name for spec in codec.fields] == ["attention_1", "attention_3"]
    assert field.shape[1:] == codec.fields[0].inner_shape
    whole = codec.decode_sample(field, lengths)
    start = 0
    for one, length in zip(exact, lengths, strict=True):
        inside = slice(start, start + length)
        found = whole if mode == "cls" else whole[..., inside, inside]
        assert (row_kl(one, found) <= largest_kl(one) + 1e-6).all()
        assert np.array_equal(found > 0, np.broadcast_to(codec.reach(length), found.shape))
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        whole = whole.copy()
        if mode != "cls":
            whole[..., inside, inside] = 0
        start += length
    assert mode == "cls" or (whole == 0).all()  # nothing between pieces


def test_triangles_are_packed_row_by_row_with_the_heads_innermost() -> None:
    codec = codec_of("full", is_causal=True)
    heads = maps(np.random.default_rng(0), 4, 3, is_causal=True)
    stored = codec.encode(heads)
    places = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    codes = encode_rows(heads)
    assert stored.tolist() == [codes[:, row, column].tolist() for row, column in places]


def test_settings_give_the_codec_back() -> None:
    for mode in ("cls", "mean", "full"):
        codec = codec_of(mode, is_causal=True)
        recorded = {"attention": codec.settings | {"implementation": "eager"}}
        assert attention_from(recorded) == codec
    assert attention_from({"task": "lm"}) is None
    with pytest.raises(UserError, match=r"encoding 'u4'.* reads 'sqrt-u8'"):
        attention_from({"attention": codec_of("mean", True).settings | {"encoding": "u4"}})
