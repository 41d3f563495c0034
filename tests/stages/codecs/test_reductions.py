"""Reductions on the device against slow float64 ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.sampled import ReducedSampled, SampledCodec
from teacher_cache.cache.codecs.topk import ReducedTopK, TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs import sampled as draws
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.measure import reconstruction_error
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.codecs.reductions import ladder, largest, sorted_head, tail_sums
from teacher_cache.stages.codecs.sampled import distinct, draw, uniforms
from teacher_cache.stages.tokens.support import Support
from tests import reference_codecs
from tests.reference_codecs import log_softmax, realistic_logits

GRID = (0.2, 1.0, 4.0)


@pytest.fixture(params=[1, 2**24])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One position at a time, and all at once."""
    for module in (reductions, draws):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(reductions, "ROWS_ELEMENTS", request.param)


def assert_close(found: Any, expected: Any) -> None:
    for name, wanted in vars(expected).items():
        ours = getattr(found, name)
        if wanted is None:
            assert ours is None, name
        elif np.issubdtype(wanted.dtype, np.integer):
            assert np.array_equal(ours, wanted), name
        else:
            np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("top_p", [None, 0.601])
@pytest.mark.parametrize("top_k", [1, 20, 300])
def test_topk_equals_the_reference(top_k: int, top_p: float | None, version: int) -> None:
    logits = realistic_logits(12, 300) + 30
    logits[3, 250:] = -np.inf
    logits[4, 2:] = -np.inf
    logits[5] = 1.5
    next_ids = np.array([NO_LABEL, 0, 299, 299, 1, 300, 5, 6, 7, 8, 9, NO_LABEL])
    codec = TopKCodec(
        support_size=300, top_k=top_k, top_p=top_p, temperatures=GRID, version=version
    )
    given_logits = torch.from_numpy(logits)
    before = given_logits.clone()
    found, unused = reduce_positions(
        codec, Support(size=300), given_logits, torch.from_numpy(next_ids)
    )
    expected = reference_codecs.reduce_topk(
        logits, top_k=top_k, temperatures=GRID, next_ids=next_ids, top_p=top_p
    )
    assert_close(found, expected)
    assert torch.equal(given_logits, before)
    assert (unused == 0).all()


@pytest.mark.parametrize("version", [1, 2])
def test_a_tail_of_1e_8_is_summed_over_the_tail(version: int) -> None:
    logits = realistic_logits(5, 1000)
    logits[:, 0] = 45
    codec = TopKCodec(support_size=1000, top_k=1, temperatures=(1.0,), version=version)
    found, _ = reduce_positions(
        codec, Support(size=1000), torch.from_numpy(logits), -torch.ones(5).long()
    )
    expected = reference_codecs.reduce_topk(logits, top_k=1, temperatures=(1.0,))
    assert isinstance(found, ReducedTopK)
    assert isinstance(found, ReducedTopK)
    assert isinstance(found, ReducedTopK)
    assert found.tail_r.max() < -15
    np.testing.assert_allclose(found.tail_r, expected.tail_r, rtol=0, atol=1e-5)


@settings(max_examples=80)
@given(st.data())
def test_ties_go_to_the_lower_id(data: st.DataObject) -> None:
    num_ids = data.draw(st.integers(1, 12))
    value = st.sampled_from([0.0, 1.0, 2.0, -np.inf])
    row = st.lists(value, min_size=num_ids, max_size=num_ids)
    logits = np.array(data.draw(st.lists(row, min_size=1, max_size=4)), np.float32)
    top_k = data.draw(st.integers(1, num_ids))
    expected = [np.lexsort((np.arange(num_ids), -one))[:top_k].tolist() for one in logits]
    assert sorted_head(torch.from_numpy(logits), top_k).tolist() == expected


@settings(max_examples=60)
@given(st.data())
def test_the_largest_are_in_the_blocks_of_the_largest(data: st.DataObject) -> None:
    """The same values as of a sort of all, whatever is tied; ids that have them."""
    num_ids = data.draw(st.integers(1, 1500))
    num = data.draw(st.integers(1, min(4, num_ids)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    few = data.draw(st.booleans())
    values = rng.integers(3, size=(3, num_ids)) if few else rng.normal(size=(3, num_ids))
    logits = torch.from_numpy(values.astype(np.float32))
    logits[0, rng.integers(num_ids, size=num_ids // 2)] = -torch.inf
    found, ids = largest(logits, num)
    assert torch.equal(found, logits.sort(dim=1, descending=True).values[:, :num])
    assert torch.equal(logits.gather(1, ids), found)
    assert all(len(set(row)) == num for row in ids.tolist())
    expected = [np.lexsort((np.arange(num_ids), -one))[:num].tolist() for one in logits.numpy()]
    assert sorted_head(logits, num).tolist() == expected


def test_a_row_is_summed_alike_among_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.from_numpy(realistic_logits(7, 3000))
    codec = TopKCodec(support_size=3000, top_k=5, version=2)
    monkeypatch.setattr(reductions, "ROWS_ELEMENTS", 3 * 3000)  # three rows, in tiles of 1,024
    monkeypatch.setattr(reductions, "TILE_ELEMENTS", 1)
    none = torch.full((7,), NO_LABEL)
    together, _ = reduce_positions(codec, Support(size=3000), logits, none)
    for place in range(7):
        where = slice(place, place + 1)
        alone, _ = reduce_positions(codec, Support(size=3000), logits[where], none[where])
        for name, one in vars(alone).items():
            if one is not None:
                assert one.tobytes() == getattr(together, name)[where].tobytes(), name
    expected = reference_codecs.reduce_topk(
        logits.numpy(), top_k=5, temperatures=codec.temperatures
    )
    assert_close(together, expected)


@pytest.mark.parametrize(
    ("temperatures", "powers"),
    [
        ((1.0, 1.5, 2.0, 3.0, 4.0), (12, 8, 6, 4, 3)),
        ((1.0,), (1,)),
        ((2.0, 4.0), (2, 1)),
        ((0.5, 1.0), (2, 1)),
        ((1.0, 1.37), None),
        ((1.0, 30.0), None),
    ],
)
def test_temperatures_share_one_exponential(
    temperatures: tuple[float, ...], powers: tuple[int, ...] | None
) -> None:
    found = ladder(temperatures)
    assert (None if found is None else found[1]) == powers
    if found is not None:
        unit, whole = found
        assert [unit * one for one in whole] == pytest.approx([1 / one for one in temperatures])
    tail = -torch.rand(4, 500, generator=torch.Generator().manual_seed(0)) * 30
    tail[:, 3] = 0
    tail[:, 7] = -torch.inf
    r, m = tail_sums(tail.clone(), temperatures)
    exact = tail.double()
    for place, t in enumerate(temperatures):
        torch.testing.assert_close(r[:, place], (exact / t).logsumexp(1), rtol=0, atol=7e-6)
        weights = (exact / t).softmax(1)
        mean = (weights * exact.clamp(min=-1e9)).sum(1)
        torch.testing.assert_close(m[:, place], mean, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_the_second_version_moves_hardly_any_stored_bit(top_p: float | None) -> None:
    """And no probability by more than a thousandth: one last place of a tail in float16."""
    logits = torch.from_numpy(realistic_logits(300, 2000))
    none = torch.full((300,), NO_LABEL)
    stored, decoded = [], []
    for version in (1, 2):
        codec = TopKCodec(support_size=2000, top_p=top_p, version=version)
        reduced, _ = reduce_positions(codec, Support(size=2000), logits, none)
        assert isinstance(reduced, ReducedTopK)
        stored.append(codec.encode(reduced))
        rows = codec.expand(stored[-1])
        decoded.append([codec.decode(rows, t) for t in (1.0, 1.7, 4.0)])
    for name, one in stored[0].items():
        differs = (one != stored[1][name]).mean()
        assert differs < (0.02 if one.dtype == np.float16 else 1e-9), name
    for old, new in zip(*decoded, strict=True):
        np.testing.assert_allclose(np.exp(new.log_probs), np.exp(old.log_probs), rtol=0, atol=1e-3)
        np.testing.assert_allclose(
            np.exp(new.tail_log_prob), np.exp(old.tail_log_prob), rtol=0, atol=1e-3
        )


def test_of_many_ids_a_new_cache_has_the_second_version() -> None:
    room, options = (
        room_of(TopKCodec(support_size=9, top_k=2)),
        {"width": 8, "has_unmatched": False},
    )
    large = room.made({}, support_size=50_257, **options)
    assert large == TopKCodec(support_size=50_257, version=2) == codec_from(large.settings)
    assert room.former(large, {}) == TopKCodec(support_size=50_257)
    small = room.made({}, support_size=8191, **options)
    assert small.version == 1 and "version" not in small.settings
    assert room.former(small, {}) is None
    mapped = room.made({}, support_size=50_257, width=8, has_unmatched=True)
    assert mapped.version == 1
    with pytest.raises(UserError, match="version 3 of the codec 'topk' is unknown"):
        codec_from(large.settings | {"version": 3})


@pytest.mark.parametrize("version", [1, 2])
def test_unused_rows_are_excluded_and_their_mass_reported(version: int) -> None:
    logits = realistic_logits(9, 60)
    support = Support.of({*range(40)} - {3, 7} | {55}, num_rows=50)
    assert (support.size, support.unused) == (40, (3, 7))
    codec = TopKCodec(support_size=40, top_k=40, version=version)
    found, unused = reduce_positions(
        codec, support, torch.from_numpy(logits), torch.full((9,), 3, dtype=torch.long)
    )
    outside = [3, 7, *range(40, 60)]
    exact = np.exp(log_softmax(logits.astype(np.float64)))
    np.testing.assert_allclose(unused, exact[:, outside].sum(-1), rtol=1e-4)
    assert isinstance(found, ReducedTopK)
    assert isinstance(found, ReducedTopK)
    assert isinstance(found, ReducedTopK)
    assert np.isneginf(found.next_log_prob).all()
    assert np.isneginf(found.below_max).sum(-1).tolist() == [2] * 9
    masked = logits.copy()
    masked[:, outside] = -np.inf
    expected = log_softmax(masked.astype(np.float64)).max(-1)
    np.testing.assert_allclose(found.top1_log_prob, expected, rtol=1e-5, atol=1e-6)


def test_support_of_a_tokenizer_without_rows() -> None:
    assert Support.of([0, 1, 2], 3) == Support(size=3)
    assert Support.of([2], 3).settings != Support.of([1, 2], 3).settings
    with pytest.raises(UserError, match="none of the tokenizer's ids has a row"):
        Support.of([5], 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.from_numpy(realistic_logits(4, 20))
    logits[2] = value if np.isinf(value) else logits[2]
    logits[2, 5] = value
    for version in (1, 2):
        codec = TopKCodec(support_size=20, top_k=3, version=version)
        with pytest.raises(UserError, match="logits at 1 positions are not finite"):
            reduce_positions(codec, Support(size=20), logits, torch.zeros(4).long())


def test_uniforms_are_of_sample_position_and_seed_alone() -> None:
    one = uniforms(b"a" * 16, 9, 5, seed=0)
    assert np.array_equal(one[:4], uniforms(b"a" * 16, 4, 5, seed=0))
    assert not np.array_equal(one, uniforms(b"b" * 16, 9, 5, seed=0))
    assert not np.array_equal(one, uniforms(b"a" * 16, 9, 5, seed=1))
    assert one.min() >= 0 and one.max() < 1
    assert uniforms(b"a", 0, 5, seed=0).shape == (0, 5)


def test_draws_follow_the_distribution_and_never_what_has_no_mass() -> None:
    weights = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.3, 1e-4, 0.2, 0.0]]))
    at = torch.from_numpy(uniforms(b"x", 1, 200_000, seed=0))
    found = draw(weights, at)
    share = torch.bincount(found[0], minlength=7).double() / 200_000
    exact = weights.double().exp()[0] / weights.double().exp().sum()
    assert ((share - exact).abs() <= 4 * (exact * (1 - exact) / 200_000).sqrt()).all()
    edges = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    assert draw(weights, edges).tolist() == [[1, 5]]


def test_distinct_counts() -> None:
    ids, counts, sizes = distinct(torch.tensor([[5, 2, 5, 5], [1, 1, 1, 1]]))
    assert (ids.tolist(), counts.tolist()) == ([[2, 5], [1, 0]], [[1, 3], [4, 0]])
    assert sizes.tolist() == [2, 1]


@pytest.mark.usefixtures("chunk_elements")
@pytest.mark.parametrize("draw_temperature", [1.0, 4.0])
def test_sampled_equals_the_reference(draw_temperature: float) -> None:
    logits = realistic_logits(6, 200)
    codec = SampledCodec(
        support_size=200, num_draws=30, temperatures=GRID, draw_temperature=draw_temperature
    )
    at = uniforms(b"x", 6, 30, seed=0)
    found, _ = reduce_positions(
        codec,
        Support(size=200),
        torch.from_numpy(logits),
        -torch.ones(6).long(),
        drawn_at=at,
    )
    assert isinstance(found, ReducedSampled)
    drawn = np.zeros((6, 30), np.int64)
    exact = np.exp(log_softmax(logits.astype(np.float64) / draw_temperature))
    for position in range(6):
        drawn[position] = np.searchsorted(np.cumsum(exact[position]), at[position], side="right")
    expected = reference_codecs.reduce_sampled(
        logits, drawn, temperatures=GRID, draw_temperature=draw_temperature
    )
    for position, size in enumerate(expected.sizes):
        one, other = found[position : position + 1], expected[position : position + 1]
        assert one.sizes[0] == size
        assert np.array_equal(one.ids[:, :size], other.ids[:, :size])
        assert np.array_equal(one.counts[:, :size], other.counts[:, :size])
        np.testing.assert_allclose(one.log_probs[:, :size], other.log_probs[:, :size], rtol=1e-4)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5, atol=1e-5)
    assert codec.encode(found)["sampled_sizes"].tolist() == expected.sizes.tolist()


def test_a_samples_draws_do_not_depend_on_its_batch() -> None:
    logits = torch.from_numpy(realistic_logits(10, 50))
    codec = SampledCodec(support_size=50, num_draws=40)
    none = torch.full((10,), -1)
    at = np.concatenate([uniforms(name, 5, 40, seed=3) for name in (b"a", b"b")])
    together, _ = reduce_positions(codec, Support(size=50), logits, none, drawn_at=at)
    alone, _ = reduce_positions(codec, Support(size=50), logits[5:], none[5:], drawn_at=at[5:])
    assert isinstance(together, ReducedSampled) and isinstance(alone, ReducedSampled)
    ours, theirs = codec.encode(together[5:10]), codec.encode(alone)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


CODECS = {
    "topk": (TopKCodec(support_size=400, top_k=16), 3e-6),
    "topk exact": (TopKCodec(support_size=400, top_k=16, is_exact=True), 5e-7),
    "nucleus": (TopKCodec(support_size=400, top_k=100, top_p=0.8), 3e-6),
    "everything": (TopKCodec(support_size=400, top_k=400), 3e-6),
    "second topk": (TopKCodec(support_size=400, top_k=16, version=2), 3e-6),
    "second nucleus": (TopKCodec(support_size=400, top_k=100, top_p=0.8, version=2), 3e-6),
    "second of everything": (TopKCodec(support_size=400, top_k=400, version=2), 3e-6),
    "sampled": (SampledCodec(support_size=400), 1e-6),
    "dense": (DenseCodec(support_size=400), 2e-6),
}


@pytest.mark.parametrize("name", CODECS)
def test_reconstruction_error(name: str) -> None:
    codec, most = CODECS[name]
    logits = torch.from_numpy(realistic_logits(40, 400))
    for temperature in (1.0, 3.0):
        error = reconstruction_error(
            codec, Support(size=400), logits, temperature=temperature,
            drawn_at=uniforms(b"x", 40, 50, seed=0),
        )  # fmt: skip
        assert 0 < error.kl < most
        assert error.kl <= error.largest_kl
        assert (error.num_positions, error.unused_mass) == (40, 0)
        is_whole = name.endswith("everything") or name == "dense"
        assert (error.lost_mass == 0) == is_whole
        assert error.bytes_per_token == codec.bytes_per_token(error.num_ids)
        assert error.to_json()["num_positions"] == 40


def test_reconstruction_error_sees_a_wrong_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = TopKCodec(support_size=400, top_k=16)
    logits = torch.from_numpy(realistic_logits(40, 400))
    exact = TopKCodec.decode

    def colder(self: TopKCodec, stored: Any, temperature: float) -> Any:
        # Of another temperature than it says.
        return replace(exact(self, stored, temperature * 1.05), temperature=temperature)

    monkeypatch.setattr(TopKCodec, "decode", colder)
    error = reconstruction_error(codec, Support(size=400), logits, temperature=1.0)
    assert error.kl > 1e-4


def test_what_a_codec_needs_is_asked_for() -> None:
    logits, none = torch.from_numpy(realistic_logits(2, 9)), torch.full((2,), -1)
    for codec, word in (
        (SampledCodec(support_size=9), "drawn_at"), (HiddenCodec(support_size=9, width=3), "states")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"needs `{word}`"):
            reduce_positions(codec, Support(size=9), logits, none)


@pytest.mark.parametrize("name", CODECS)
def test_no_positions(name: str) -> None:
    codec, _ = CODECS[name]
    reduced, unused = reduce_positions(
        codec, Support(size=400), torch.zeros(0, 400), torch.zeros(0, dtype=torch.long),
        drawn_at=uniforms(b"x", 0, 50, seed=0),
    )  # fmt: skip
    assert (len(reduced), unused.shape) == (0, (0,))
    stored: Any = codec.encode(reduced)
    assert codec.decode(codec.expand(stored), 1.0).tail_log_prob.shape == (0,)
