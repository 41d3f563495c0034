"""Distinct ids: who is drawn how often, by all that the one number of a position can do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.sampled import DistinctCodec, ReducedDistinct, SampledCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.codecs import sampled as draws
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.interface import Weighted
from teacher_cache.stages.codecs.measure import reconstruction_error
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.codecs.sampled import draw_distinct, uniforms
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import divergence, reverse_kl
from teacher_cache.stages.losses.draws import WeightedTargets, sampled_kl
from teacher_cache.stages.tokens.support import AnySupport, Support
from teacher_cache.stages.training.targets import CachedTargets
from tests.reference_codecs import log_softmax, realistic_logits
from tests.stages.codecs.test_mapped_reductions import (
    NUM_STUDENT,
    NUM_TEACHER,
    mapped,
    one_to_one,
)

GRID = (1.0, 2.0, 4.0)


def inclusion(p: np.ndarray, num_ids: int) -> np.ndarray:
    """`min(1, c p)` that sum to so many, by bisection; the most probable is certain. Float64."""
    found = np.zeros_like(p)
    first = int(np.argmax(p))
    found[first] = 1
    others = np.delete(np.arange(len(p)), first)
    possible = others[p[others] > 0]
    if len(possible) <= num_ids - 1:
        found[possible] = 1
        return found
    low, high = 0.0, (num_ids - 1) / p[possible].min()
    for _ in range(100):
        middle = (low + high) / 2
        few = np.minimum(1, middle * p[possible]).sum() < num_ids - 1
        low, high = (middle, high) if few else (low, middle)
    found[possible] = np.minimum(1, high * p[possible])
    return found


def every_draw(below: np.ndarray, num_ids: int, t: float) -> tuple[np.ndarray, np.ndarray]:
    """One number out of each stretch of [0, 1) in which the same ids are drawn; its lengths.

    The stretches end where a point meets a border between cumulated weights.
    """
    row = torch.from_numpy(below[None])
    top = draws.sorted_head(row, num_ids)
    weights = (row / t).exp()
    of_top = weights.gather(1, top).double()
    rest = weights.clone().scatter_(1, top, 0.0)
    num_heads, tail = draws._certain(of_top, rest.double().sum(1, keepdim=True))
    tails = torch.cat([of_top[:, num_heads:], rest.double()], dim=1)[0]
    step = float(tail) / max(1, num_ids - int(num_heads))
    borders = (tails.cumsum(0) / step).numpy() % 1 if step else np.zeros(0)
    edges = np.unique(np.concatenate([[0.0, 1.0], borders]))
    return (edges[:-1] + edges[1:]) / 2, np.diff(edges)


def rounded_many_times(
    at: np.ndarray, lengths: np.ndarray, num_ids: int, *, times: int
) -> tuple[np.ndarray, Tensor]:
    """The numbers of positions that draw each way many times, and the share of each."""
    chances = np.random.default_rng(0).random((len(at) * times, num_ids))
    numbers = np.concatenate([np.repeat(at, times)[:, None], chances], axis=1)
    return numbers, torch.from_numpy(np.repeat(lengths / times, times))


logits_of_a_position = st.one_of(
    st.integers(0, 200).map(lambda seed: realistic_logits(1, 40, seed=seed)[0]),
    st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.5, -3.0, -np.inf]), min_size=3, max_size=20).map(
        lambda row: np.array([*row, 1.5], np.float32)
    ),
    st.just(np.zeros(12, np.float32)),
    st.just(np.array([0, -200, -0.5, -100], np.float32)),
)


@settings(max_examples=60)
@given(row=logits_of_a_position, num_ids=st.integers(2, 9), t=st.sampled_from([1.0, 3.0]))
def test_each_id_is_kept_with_its_probability(row: np.ndarray, num_ids: int, t: float) -> None:
    below = (row - row.max()).astype(np.float32)
    num_ids = min(num_ids, len(below))
    at, lengths = every_draw(below, num_ids, t)
    rows = torch.from_numpy(np.repeat(below[None], len(at), axis=0))
    ids, num_heads = draw_distinct(rows, num_ids, t, torch.from_numpy(at))
    found = np.zeros(len(below) + 1)
    for one, length in zip(ids.numpy(), lengths, strict=True):
        kept = one[one < len(below)]
        assert len(np.unique(kept)) == len(kept)
        found[kept] += length
    p = np.exp(log_softmax(below.astype(np.float64) / t))
    p[np.exp(below / np.float32(t)) == 0] = 0  # of no mass in float32
    np.testing.assert_allclose(found[:-1], inclusion(p, num_ids), rtol=2e-5, atol=1e-7)
    assert len(set(num_heads.tolist())) == 1
    heads = np.lexsort((np.arange(len(p)), -below))[: int(num_heads[0])]
    assert (ids.numpy()[:, : int(num_heads[0])] == heads).all()


def encoded(codec: DistinctCodec, logits: np.ndarray) -> dict[str, np.ndarray]:
    """Of positions of a sample."""
    reduced, _ = reduce_positions(
        codec,
        Support(size=codec.support_size),
        torch.from_numpy(logits),
        torch.full((len(logits),), NO_LABEL),
        drawn_at=room_of(codec).draws(codec, b"x", len(logits)),
    )
    assert isinstance(reduced, ReducedDistinct)
    return codec.encode(reduced)


def weighted(codec: DistinctCodec, stored: dict[str, np.ndarray], t: float) -> WeightedTargets:
    tensors = {name: torch.from_numpy(one) for name, one in codec.expand(stored).items()}
    found = CachedTargets(
        codec=codec, stored=tensors, temperature=t, num_outcomes=codec.support_size
    ).at_positions(slice(None))
    assert isinstance(found, WeightedTargets)
    return found


def stored_draws(
    codec: DistinctCodec, support: AnySupport, row: np.ndarray, at: np.ndarray
) -> dict[str, np.ndarray]:
    """One position over and over, each time with numbers of its own, as a cache holds it."""
    logits = torch.from_numpy(np.repeat(row[None], len(at), axis=0))
    nexts = torch.full((len(at),), NO_LABEL)
    reduced, _ = reduce_positions(codec, support, logits, nexts, drawn_at=at)
    assert isinstance(reduced, ReducedDistinct)
    return codec.encode(reduced)


def estimates(found: WeightedTargets, num: int) -> Tensor:
    """[..., V] float64: what stands for the teacher's probabilities."""
    ids = torch.where(found.ids < 0, num, found.ids)
    zeros = torch.zeros(len(ids), num + 1, dtype=torch.float64)
    return zeros.scatter_add(1, ids, found.weights().double())[:, :num]


@pytest.mark.parametrize("draw_temperature", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_stored_is_right_in_the_mean(seed: int, draw_temperature: float) -> None:
    """Over every draw, and over how each is rounded: at the draws' temperature and at others."""
    row = realistic_logits(1, 60, seed=seed)[0]
    codec = DistinctCodec(
        support_size=60, num_ids=9, temperatures=GRID, draw_temperature=draw_temperature
    )
    at, lengths = every_draw((row - row.max()).astype(np.float32), 9, draw_temperature)
    numbers, shares = rounded_many_times(at, lengths, 9, times=600)
    stored = stored_draws(codec, Support(size=60), row, numbers)
    for t in GRID:
        found = weighted(codec, stored, t)
        p = np.exp(log_softmax(row.astype(np.float64) / t))
        mean = (shares[:, None] * estimates(found, 60)).sum(0)
        # What is left is the noise of so many roundings, and half the variance of a log-prob's.
        most = 4e-4 if t == draw_temperature else 2e-3
        np.testing.assert_allclose(mean, p, rtol=most, atol=1e-9)
        assert abs((mean.numpy() / p - 1).mean()) < most / 6
        sums = found.weights().double().sum(-1)
        if t == draw_temperature:
            np.testing.assert_allclose(sums, 1, atol=1e-6)
        else:
            assert float(sums.std()) > 1e-3


def test_a_part_is_an_equal_part_of_the_tail_whatever_its_byte_says() -> None:
    codec = DistinctCodec(support_size=300, num_ids=24, temperatures=(1.0, 2.0))
    logits = realistic_logits(50, 300)
    stored = encoded(codec, logits)
    exact = np.exp(log_softmax(logits.astype(np.float64)))
    found = weighted(codec, stored, 1.0)
    off = []
    for position in range(50):
        size = int(stored["sampled_heads"][position])
        weights = found.weights()[position].double().numpy()
        ids = found.ids[position].numpy()
        assert np.ptp(weights[size:]) < 1e-7 * weights[size]
        left = 1 - exact[position, ids[:size]].sum()
        off.append(weights[size:].sum() / left - 1)
        np.testing.assert_allclose(weights[:size], exact[position, ids[:size]], rtol=0.02)
    assert np.abs(off).max() < 6e-3 and abs(np.mean(off)) < 3e-4
    other = {**stored, "sampled_values": np.minimum(stored["sampled_values"], 200)}
    size = int(stored["sampled_heads"].max())
    other["sampled_values"][:, :size] = stored["sampled_values"][:, :size]
    torch.testing.assert_close(weighted(codec, other, 1.0).weights(), found.weights())


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_mean_gradient_and_value_are_those_of_the_whole_distribution(t: float) -> None:
    row = realistic_logits(1, 60, seed=5)[0]
    codec = DistinctCodec(support_size=60, num_ids=7, temperatures=(1.0, 2.0))
    at, lengths = every_draw((row - row.max()).astype(np.float32), 7, 1.0)
    numbers, shares = rounded_many_times(at, lengths, 7, times=100)
    found = weighted(codec, stored_draws(codec, Support(size=60), row, numbers), t)
    student = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = student.expand(len(numbers), -1).clone().requires_grad_()
    values = sampled_kl(leaf, found)
    (shares * values).sum().backward()
    one = student[None].clone().requires_grad_()
    full = TeacherDistribution.from_logits(torch.from_numpy(row[None].astype(np.float64)), t)
    exact = divergence(one, full)
    exact.sum().backward()
    assert leaf.grad is not None and one.grad is not None
    torch.testing.assert_close(leaf.grad.sum(0), one.grad[0], rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(
        (shares * values.detach()).sum(), exact[0].detach(), rtol=2e-3, atol=0
    )
    # Each by its formula: ((sum w) q - w) / T.
    q = (student / t).softmax(0)
    w = estimates(found, 60)
    expected = shares[:, None] * (w.sum(1, keepdim=True) * q - w) / t
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-9)


def test_as_many_bytes_say_more_than_draws_with_replacement() -> None:
    """Half the bytes for the same variance; at equal bytes a third of it at most."""
    logits = realistic_logits(60, 1000, seed=1)
    p = np.exp(log_softmax(logits.astype(np.float64)))
    one_draw = 1 - (p**2).sum(1)
    old = SampledCodec(support_size=1000, temperatures=(1.0,))
    num_distinct = (1 - (1 - p) ** 50).sum(1).mean()
    old_bytes, old_variance = old.bytes_per_token(num_distinct), (one_draw / 50).mean()

    def variance(num_ids: int) -> float:
        kept = np.stack([inclusion(row, num_ids) for row in p])
        return (p**2 * (1 / np.where(kept > 0, kept, 1) - 1)).sum(1).mean()

    def most_ids(num_bytes: float) -> int:
        sizes = range(2, 250)
        fits = [
            DistinctCodec(support_size=1000, num_ids=n, temperatures=(1.0,)).bytes_per_token()
            <= num_bytes
            for n in sizes
        ]
        return sizes[sum(fits) - 1]

    assert variance(most_ids(old_bytes)) < old_variance / 3
    assert variance(most_ids(0.55 * old_bytes)) < old_variance


def test_other_divergences_know_the_head_and_the_first_id() -> None:
    logits = realistic_logits(40, 300)
    codec = DistinctCodec(support_size=300, num_ids=16)
    found = weighted(codec, encoded(codec, logits), 2.0)
    assert found.top_ids().tolist() == logits.argmax(1).tolist()
    student = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    coarse = found.coarse()
    torch.testing.assert_close(
        coarse.outcome_log_probs.exp().sum(-1), torch.ones(40), rtol=0, atol=1e-6
    )
    exact = torch.log_softmax(torch.from_numpy(logits) / 2, dim=-1).gather(1, found.ids)
    torch.testing.assert_close(coarse.log_probs, exact, rtol=0.01, atol=0.05)
    full = TeacherDistribution.from_logits(torch.from_numpy(logits), 2.0)
    assert (divergence(student, coarse, reverse_kl) < divergence(student, full, reverse_kl)).all()
    room = room_of(codec)
    assert room.coarse_for(divergence="reverse-kl", is_projected=False) is None
    part = found.at_positions(slice(3, 9))
    torch.testing.assert_close(sampled_kl(student[3:9], part), sampled_kl(student, found)[3:9])
    # At the temperature of the draws all count; elsewhere some stand for little.
    assert weighted(codec, encoded(codec, logits), 1.0).num_effective().tolist() == pytest.approx(
        [16.0] * 40
    )
    assert (found.num_effective() < 16).any() and (found.num_effective() > 1).all()


def test_of_the_mapped_teacher_as_of_any() -> None:
    support = one_to_one()
    row = realistic_logits(1, NUM_TEACHER, seed=2)[0]
    codec = DistinctCodec(
        support_size=NUM_STUDENT, num_ids=6, temperatures=GRID, has_unmatched=True
    )
    numbers = uniforms(b"m", 4000, 7, seed=0)
    stored = stored_draws(codec, support, row, numbers)
    for t in GRID:
        found = weighted(codec, stored, t)
        values = estimates(found, NUM_STUDENT)
        wanted = mapped(row, support.student_ids.numpy(), NUM_STUDENT, t)
        error = values.mean(0).numpy() - wanted.masses
        standard = values.std(0).numpy() / np.sqrt(len(values))
        assert (np.abs(error) < 4 * standard + 1e-3 * wanted.masses + 1e-12).all()
        tensors = {name: torch.from_numpy(one) for name, one in stored.items()}
        answer = room_of(codec).answer(codec, tensors, t)
        assert isinstance(answer, Weighted)
        assert float(answer.unmatched_log_prob.exp().mean()) == pytest.approx(
            wanted.unmatched, rel=1e-3
        )


def test_a_position_of_which_nothing_maps_keeps_nothing() -> None:
    support = one_to_one()
    has_none = support.student_ids.numpy() < 0
    logits = realistic_logits(2, NUM_TEACHER)
    logits[0, ~has_none] = -np.inf
    codec = DistinctCodec(support_size=NUM_STUDENT, num_ids=6, has_unmatched=True)
    reduced, _ = reduce_positions(
        codec, support, torch.from_numpy(logits), torch.full((2,), NO_LABEL),
        drawn_at=uniforms(b"u", 2, 7, seed=0),
    )  # fmt: skip
    assert isinstance(reduced, ReducedDistinct)
    found = weighted(codec, codec.encode(reduced), 1.0)
    assert (found.ids[0] == -1).all() and not found.weights()[0].any()
    assert found.weights()[1].sum() > 0
    assert found.head.tail_log_prob is not None
    assert float(found.head.tail_log_prob[0]) == pytest.approx(0, abs=1e-6)


def test_where_few_ids_have_any_mass_all_are_kept() -> None:
    logits = realistic_logits(3, 30)
    logits[:, 4:] = -np.inf
    logits[2, 1:] = -np.inf
    codec = DistinctCodec(support_size=30, num_ids=8)
    found = weighted(codec, encoded(codec, logits), 1.0)
    assert [(row >= 0).sum().item() for row in found.ids] == [4, 4, 1]
    p = torch.log_softmax(torch.from_numpy(logits), -1).exp()
    torch.testing.assert_close(estimates(found, 30), p.double(), rtol=0.02, atol=1e-6)
    assert found.head.tail_log_prob is not None and found.head.tail_log_prob.isneginf().all()


@pytest.mark.parametrize("chunk_elements", [1, 2**22])
def test_a_samples_draws_do_not_depend_on_its_batch(
    chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS", chunk_elements)
    logits = torch.from_numpy(realistic_logits(10, 50))
    codec, none = DistinctCodec(support_size=50, num_ids=8), torch.full((10,), NO_LABEL)
    room = room_of(codec)
    numbers = [room.draws(codec, name, 5) for name in (b"a", b"b")]
    at = np.concatenate([one for one in numbers if one is not None])
    assert at.shape == (10, 9)
    together, _ = reduce_positions(codec, Support(size=50), logits, none, drawn_at=at)
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS", 2**22)
    alone, _ = reduce_positions(codec, Support(size=50), logits[5:], none[5:], drawn_at=at[5:])
    assert isinstance(together, ReducedDistinct) and isinstance(alone, ReducedDistinct)
    ours, theirs = codec.encode(together[5:10]), codec.encode(alone)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_error_that_the_probe_measures() -> None:
    codec = DistinctCodec(support_size=400)
    for t in (1.0, 3.0):
        error = reconstruction_error(
            codec, Support(size=400), torch.from_numpy(realistic_logits(40, 400)),
            temperature=t, drawn_at=uniforms(b"x", 40, 33, seed=0),
        )  # fmt: skip
        assert 0 < error.kl < 1e-4 and error.num_ids == 32
        assert error.bytes_per_token == codec.bytes_per_token() == 3 * 32 + 7 + 10


def test_no_positions() -> None:
    codec = DistinctCodec(support_size=70_000, num_ids=5)
    stored = encoded(codec, np.zeros((0, 70_000), np.float32))
    assert stored["sampled_ids_high"].shape == (0, 2)
    assert codec.decode(codec.expand(stored), 1.0).log_probs.shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_ids": 1}, "--num-ids 1 cannot be: the teacher uses 90 ids, so give 2 to 90"),
        ({"num_ids": 91}, "--num-ids 91 cannot be"),
        ({"support_size": 999, "num_ids": 256}, "so give 2 to 255"),
        ({"draw_temperature": 1.2}, r"temperature 1.2 is not of the grid .*\(1,1.5,2,3,4\)"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DistinctCodec(**{"support_size": 90, **change})


def test_the_version_is_in_the_settings() -> None:
    codec = DistinctCodec(support_size=90, temperatures=GRID, draw_temperature=2.0)
    assert codec_from(codec.settings) == codec and codec.settings["version"] == 2
    old = SampledCodec(support_size=90)
    assert codec_from(old.settings) == old and "version" not in old.settings
    with pytest.raises(UserError, match="version 3 of the codec 'sampled' is unknown"):
        codec_from(codec.settings | {"version": 3})
    with pytest.raises(UserError, match="temperature 3 is not of the grid"):
        room_of(codec).require_temperature(codec, 3.0)
