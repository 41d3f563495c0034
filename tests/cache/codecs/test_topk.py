from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.interface import Decoded
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.temperatures import DEFAULT_TEMPERATURES
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from tests.reference_codecs import log_softmax, log_sum_exp, realistic_logits, reduce_topk

WAYS: list[dict[str, Any]] = [
    {}, {"is_exact": True}, {"top_p": 0.8}, {"top_p": 0.8, "is_exact": True}
]  # fmt: skip


def stored_by(codec: TopKCodec, logits: np.ndarray) -> dict[str, np.ndarray]:
    reduced = reduce_topk(
        logits, top_k=codec.top_k, temperatures=codec.temperatures, top_p=codec.top_p
    )
    return codec.expand(codec.encode(reduced))


def decoded_twice(codec: Any, stored: dict[str, np.ndarray], temperature: float) -> Decoded:
    """By numpy, after comparing with torch's: to a unit of float32's, or of float64's sums."""
    found = codec.decode(stored, temperature)
    tensors = {name: torch.from_numpy(one) for name, one in stored.items()}
    on_torch = codec.decode(tensors, temperature)
    assert np.array_equal(found.ids, on_torch.ids.numpy())
    assert on_torch.ids.dtype == torch.int64
    for name in ("log_probs", "tail_log_prob"):
        ours, theirs = getattr(found, name), getattr(on_torch, name).numpy()
        assert (ours.dtype, theirs.dtype) == (np.float32, np.float32)
        assert np.array_equal(np.isneginf(ours), np.isneginf(theirs)), name
        finite = ~np.isneginf(ours)
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1.2e-7, atol=1e-13)
    return found


def total(decoded: Decoded) -> np.ndarray:
    """[N], the mass of head and ghost."""
    head = np.exp(decoded.log_probs.astype(np.float64)).sum(-1)
    return head + np.exp(decoded.tail_log_prob.astype(np.float64))


def divergence(logits: np.ndarray, decoded: Decoded) -> np.ndarray:
    """[N] KL over head and ghost from the exact teacher."""
    assert decoded.ids is not None
    exact = log_softmax(logits.astype(np.float64) / decoded.temperature)
    found = []
    for row, ids, log_q, tail_q in zip(
        exact, decoded.ids, decoded.log_probs, decoded.tail_log_prob, strict=True
    ):
        ids, log_q = ids[ids >= 0], log_q[ids >= 0].astype(np.float64)
        kept = ~np.isneginf(row[ids])
        p, ids, log_q = np.exp(row[ids][kept]), ids[kept], log_q[kept]
        kl = (p * (row[ids] - log_q)).sum()
        tail = log_sum_exp(np.delete(row, ids))  # excluded ids of the head add nothing to it
        found.append(kl + (0 if np.isneginf(tail) else np.exp(tail) * (tail - tail_q)))
    return np.array(found)


@st.composite
def _logits(draw: st.DrawFn) -> np.ndarray:
    """Few ids, with ties and excluded ones; each position has one that is not."""
    num_ids = draw(st.integers(1, 9))
    value = st.sampled_from([0.0, 1.0, 1.0, -3.0, 40.0, -200.0, -np.inf]) | st.floats(
        -30, 30, width=32
    )
    row = st.lists(value, min_size=num_ids, max_size=num_ids)
    rows = draw(st.lists(row.filter(lambda one: max(one) > -np.inf), max_size=4))
    return np.array(rows, np.float32).reshape(-1, num_ids)


@settings(max_examples=60)
@given(_logits(), st.data())
def test_any_logits(logits: np.ndarray, data: st.DataObject) -> None:
    num, num_ids = logits.shape
    codec = TopKCodec(
        support_size=num_ids, top_k=data.draw(st.integers(1, num_ids)),
        **data.draw(st.sampled_from(WAYS)),
    )  # fmt: skip
    if not num:
        logits = np.zeros((1, num_ids), np.float32)
    stored = stored_by(codec, logits)
    if not num:
        stored = {name: one[:0] for name, one in stored.items()}
        logits = logits[:0]
    temperature = data.draw(st.sampled_from([*DEFAULT_TEMPERATURES, 1.2, 2.6]))
    decoded = decoded_twice(codec, stored, temperature)
    np.testing.assert_allclose(total(decoded), 1, rtol=0, atol=1e-6)
    if temperature in DEFAULT_TEMPERATURES:
        # A range of up to 240 nats: coarse steps, and still a bounded error.
        assert (divergence(logits, decoded) < 0.05).all()
        assert (divergence(logits, decoded) > -1e-6).all()


@pytest.mark.parametrize("way", WAYS)
def test_realistic_logits_lose_about_1e_7_nats(way: dict[str, Any]) -> None:
    logits = realistic_logits(60, 2000)
    codec = TopKCodec(support_size=2000, top_k=32, **way)
    stored = stored_by(codec, logits)
    for temperature in DEFAULT_TEMPERATURES:
        kl = divergence(logits, decoded_twice(codec, stored, temperature))
        assert kl.mean() < (5e-7 if codec.is_exact else 3e-6)


def test_head_and_ghost_sum_to_one_where_one_minus_the_sum_would_not() -> None:
    logits = realistic_logits(50, 500)
    logits[:, 0] = 40  # a tail of 1e-8 and less
    codec = TopKCodec(support_size=500, top_k=8)
    decoded = codec.decode(stored_by(codec, logits), 1.0)
    np.testing.assert_allclose(total(decoded), 1, rtol=0, atol=1e-6)
    exact = log_softmax(logits.astype(np.float64))
    assert decoded.ids is not None
    tails = [log_sum_exp(np.delete(row, ids)) for row, ids in zip(exact, decoded.ids, strict=True)]
    assert max(tails) < -12
    # Relative to the tail itself: f16 of about 20 nats.
    np.testing.assert_allclose(decoded.tail_log_prob, tails, rtol=0, atol=0.02)


@pytest.mark.parametrize("way", [{}, {"is_exact": True}, {"top_p": 1.0}])
@pytest.mark.parametrize("temperature", [1.0, 1.7, 4.0])
def test_a_head_that_is_everything_has_no_tail(way: dict[str, Any], temperature: float) -> None:
    logits = realistic_logits(20, 30)
    codec = TopKCodec(support_size=30, top_k=30, **way)
    decoded = decoded_twice(codec, stored_by(codec, logits), temperature)
    assert decoded.ids is not None
    if codec.top_p is None:
        assert np.isneginf(decoded.tail_log_prob).all()
    np.testing.assert_allclose(np.exp(decoded.log_probs.astype(np.float64)).sum(-1), 1, atol=1e-6)


def test_a_tail_of_excluded_ids_is_none() -> None:
    logits = np.array([[1.0, 2.0, -np.inf, -np.inf]], np.float32)
    codec = TopKCodec(support_size=4, top_k=3)
    decoded = decoded_twice(codec, stored_by(codec, logits), 2.5)
    assert decoded.ids is not None
    assert decoded.ids.tolist() == [[1, 0, 2]]
    assert np.isneginf(decoded.log_probs).tolist() == [[False, False, True]]
    assert np.isneginf(decoded.tail_log_prob).all()


def test_between_temperatures_the_tail_is_right_to_1e_3() -> None:
    """Hermite in 1/T, against the exact tail; straight lines in 1/T lose ten times as much."""
    logits = realistic_logits(100, 5000)
    codec = TopKCodec(support_size=5000, top_k=32)
    stored = stored_by(codec, logits)
    below = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    ids = codec.decode(stored, 1.0).ids
    assert ids is not None
    tails = np.stack([np.delete(row, one) for row, one in zip(below, ids, strict=True)])
    heads = np.take_along_axis(below, ids, 1)
    worst = straight = 0.0
    for temperature in (1.2, 1.7, 2.4, 3.4):
        decoded = decoded_twice(codec, stored, temperature)
        log_odds = log_sum_exp(tails / temperature) - log_sum_exp(heads / temperature)
        head = log_sum_exp(decoded.log_probs.astype(np.float64))
        worst = max(worst, float(np.abs(decoded.tail_log_prob - head - log_odds).mean()))
        betas = [1 / one for one in DEFAULT_TEMPERATURES][::-1]
        r = [log_sum_exp(tails / one) for one in DEFAULT_TEMPERATURES][::-1]
        lines = np.array([np.interp(1 / temperature, betas, one) for one in np.stack(r, -1)])
        exact = log_sum_exp(tails / temperature)
        straight = max(straight, float(np.abs(lines - exact).mean()))
        np.testing.assert_allclose(total(decoded), 1, rtol=0, atol=1e-6)
        assert divergence(logits, decoded).mean() < 5e-6
    assert worst < 3e-3
    assert worst * 10 < straight


def test_the_tails_mass_is_the_true_one_beside_the_rounded_head() -> None:
    """Moving r_T by what rounding did to the head's sum lowers the KL (f16 kept out of it)."""
    logits = realistic_logits(300, 400)
    codec = TopKCodec(support_size=400, top_k=24, temperatures=(1.0,))
    reduced = reduce_topk(logits, top_k=24, temperatures=(1.0,))
    head = codec.decode(codec.encode(reduced), 1.0)
    relative = head.log_probs.astype(np.float64) - head.log_probs[:, :1]
    exact = log_softmax(logits.astype(np.float64))
    kl = {}
    moved = log_sum_exp(relative) - log_sum_exp(reduced.below_max)
    for name, r in {
        "as it is": reduced.tail_r[:, 0],
        "moved": reduced.tail_r[:, 0] + moved,
    }.items():
        lse = np.logaddexp(log_sum_exp(relative), r)
        decoded = Decoded(
            ids=reduced.ids, log_probs=relative - lse[:, None], tail_log_prob=r - lse,
            temperature=1.0,
        )  # fmt: skip
        kl[name] = divergence(logits, decoded)
    assert (kl["moved"] <= kl["as it is"] + 1e-12).all()
    assert kl["moved"].mean() < kl["as it is"].mean()
    # And what is stored is the moved one, to the rounding of f16.
    np.testing.assert_allclose(
        codec.encode(reduced)["tail_r"][:, 0], reduced.tail_r[:, 0] + moved, rtol=2**-10
    )
    tail_mass = [
        np.exp(np.delete(row, ids)).sum() for row, ids in zip(exact, reduced.ids, strict=True)
    ]
    np.testing.assert_allclose(np.exp(head.tail_log_prob), tail_mass, rtol=4e-3)


def test_a_nucleus_keeps_the_smallest_head_with_its_mass() -> None:
    logits = realistic_logits(40, 300)
    codec = TopKCodec(support_size=300, top_k=100, top_p=0.7)
    decoded = decoded_twice(codec, stored_by(codec, logits), 1.0)
    assert decoded.ids is not None
    sizes = (decoded.ids >= 0).sum(-1)
    assert len(set(sizes.tolist())) > 5
    exact = np.exp(log_softmax(logits.astype(np.float64)))
    for row, ids, log_probs, size in zip(exact, decoded.ids, decoded.log_probs, sizes, strict=True):
        assert (ids[:size] >= 0).all() and (ids[size:] == -1).all()
        assert np.isneginf(log_probs[size:]).all()
        assert size == 100 or row[ids[:size]].sum() >= 0.7
        assert row[ids[: size - 1]].sum() < 0.7


@pytest.mark.parametrize(
    ("support_size", "top_k", "grid", "way", "expected"),
    [
        (50_000, 32, 5, {}, 122), (152_000, 64, 5, {}, 234), (50_000, 32, 1, {}, 106),
        (152_000, 64, 1, {}, 218), (65_536, 7, 2, {}, 3 * 7 + 6 + 8),
        (65_537, 7, 2, {}, 3 * 7 + 2 + 6 + 8), (300_000, 8, 2, {}, 5 * 8 + 6 + 8),
        (50_000, 32, 5, {"is_exact": True}, 4 * 32 + 4 + 20),
        (152_000, 64, 5, {"is_exact": True}, 4 * 64 + 16 + 4 + 20),
    ],
)  # fmt: skip
def test_bytes_a_token(
    support_size: int, top_k: int, grid: int, way: dict[str, Any], expected: int
) -> None:
    temperatures = DEFAULT_TEMPERATURES[:grid]
    codec = TopKCodec(support_size=support_size, top_k=top_k, temperatures=temperatures, **way)
    assert codec.bytes_per_token() == expected
    reduced = reduce_topk(realistic_logits(3, 200), top_k=top_k, temperatures=temperatures)
    assert sum(one.nbytes for one in codec.encode(reduced).values()) == 3 * expected


@pytest.mark.parametrize("support_size", [50_000, 152_000])
def test_bytes_a_token_of_a_nucleus(support_size: int) -> None:
    codec = TopKCodec(support_size=support_size, top_k=60, top_p=0.9)
    reduced = reduce_topk(
        realistic_logits(8, 200), top_k=60, temperatures=codec.temperatures, top_p=0.9
    )
    assert reduced.sizes is not None
    num_ids = int(reduced.sizes.sum())
    stored = codec.encode(reduced)
    planes = -(-num_ids // 4) if support_size > 65_536 else 0
    assert sum(one.nbytes for one in stored.values()) == 3 * num_ids + planes + 8 * (6 + 20 + 2)
    assert abs(codec.bytes_per_token(num_ids / 8) - (3 * num_ids + planes) / 8 - 28) < 0.2
    expanded = codec.expand(stored)
    assert {len(one) for one in expanded.values()} == {8}


def test_padded_positions_give_no_nan() -> None:
    codec = TopKCodec(support_size=50, top_k=8, top_p=0.5)
    stored = stored_by(codec, realistic_logits(3, 50))
    padded = {
        name: np.pad(one, [(0, 2), *[(0, 0)] * (one.ndim - 1)])[None]
        for name, one in stored.items()
    }
    with np.errstate(divide="ignore"):
        decoded = decoded_twice(codec, padded, 1.4)
    assert decoded.ids is not None
    assert (decoded.ids[0, 3:] == -1).all()
    assert not np.isnan(decoded.log_probs).any() and not np.isnan(decoded.tail_log_prob).any()


@pytest.mark.parametrize("temperature", [0.9, 4.01, 0.0, -1.0])
def test_outside_the_grid_is_refused(temperature: float) -> None:
    codec = TopKCodec(support_size=9, top_k=3)
    with pytest.raises(UserError, match=r"outside the grid of the cache \(1,1.5,2,3,4\)"):
        codec.decode(stored_by(codec, realistic_logits(2, 9)), temperature)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"top_k": 10}, "--top-k 10 cannot be: the teacher uses 9 ids, so give 1 to 9"),
        ({"top_k": 0}, "--top-k 0 cannot be"),
        ({"top_p": 1.5}, "--top-p 1.5 is no share"),
        ({"temperatures": ()}, "--temperatures none is no grid"),
        ({"temperatures": (2.0, 1.0)}, "--temperatures 2,1 is no grid"),
        ({"temperatures": (0.0, 1.0)}, "--temperatures 0,1 is no grid"),
    ],
)
def test_settings_that_cannot_be(settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TopKCodec(**{"support_size": 9, "top_k": 3, **settings_})


def test_settings_make_the_codec_again() -> None:
    codec = TopKCodec(support_size=9, top_k=3, temperatures=(1.0, 2.0), top_p=0.9)
    assert codec_from(codec.settings) == codec
    assert codec_from(replace(codec, is_exact=True).settings) != codec
    with pytest.raises(UserError, match=r"codec 'topq' is unknown.*did you mean 'topk'"):
        codec_from({"name": "topq"})
