from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.errors import UserError
from tests.cache.codecs.test_topk import decoded_twice, total
from tests.reference_codecs import log_softmax, realistic_logits, reduce_sampled


def stored_by(
    codec: SampledCodec, logits: np.ndarray, *, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What is stored of draws, a row a position, and the draws [N, D]."""
    rng = np.random.default_rng(seed)
    p = np.exp(log_softmax(logits.astype(np.float64) / codec.draw_temperature))
    draws = np.stack([rng.choice(len(row), codec.num_draws, p=row / row.sum()) for row in p])
    reduced = reduce_sampled(
        logits, draws, temperatures=codec.temperatures, draw_temperature=codec.draw_temperature
    )
    return codec.expand(codec.encode(reduced)), draws


@settings(max_examples=40)
@given(
    num_ids=st.sampled_from([1, 2, 7, 300]),
    num_draws=st.integers(1, 255),
    draw_temperature=st.sampled_from([1.0, 2.0]),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    support_size=st.sampled_from([0, 70_000, 300_000]),
    seed=st.integers(0, 9),
)
def test_gives_back_ids_counts_and_log_probs(
    num_ids: int,
    num_draws: int,
    draw_temperature: float,
    temperature: float,
    support_size: int,
    seed: int,
) -> None:
    logits = realistic_logits(3, num_ids, seed=seed)
    codec = SampledCodec(
        support_size=max(num_ids, support_size), num_draws=num_draws,
        temperatures=(1.0, 2.0, 4.0), draw_temperature=draw_temperature,
    )  # fmt: skip
    stored, draws = stored_by(codec, logits, seed=seed)
    decoded = decoded_twice(codec, stored, temperature)
    assert decoded.ids is not None
    np.testing.assert_allclose(total(decoded), 1, rtol=0, atol=1e-6)
    exact = log_softmax(logits.astype(np.float64) / temperature)
    for position, drawn in enumerate(draws):
        ids, counts = np.unique(drawn, return_counts=True)
        assert stored["sampled_counts"][position, : len(ids)].tolist() == counts.tolist()
        size = len(ids)
        assert decoded.ids[position].tolist()[:size] == ids.tolist()
        assert (decoded.ids[position, size:] == -1).all()
        assert np.isneginf(decoded.log_probs[position, size:]).all()
        np.testing.assert_allclose(
            decoded.log_probs[position, :size], exact[position, ids], rtol=2e-3, atol=0.012
        )


@pytest.mark.parametrize("support_size", [50_000, 152_000])
def test_bytes_a_token(support_size: int) -> None:
    codec = SampledCodec(support_size=support_size)
    logits, rng = realistic_logits(6, 400), np.random.default_rng(0)
    reduced = reduce_sampled(
        logits, rng.integers(40, size=(6, 50)), temperatures=codec.temperatures,
        draw_temperature=1.0,
    )  # fmt: skip
    num_ids = int(reduced.sizes.sum())
    planes = -(-num_ids // 4) if support_size > 65_536 else 0
    stored = codec.encode(reduced)
    assert sum(one.nbytes for one in stored.values()) == 5 * num_ids + planes + 6 * (6 + 2 * 5)
    assert abs(codec.bytes_per_token(num_ids / 6) - (5 * num_ids + planes) / 6 - 16) < 0.2
    assert SampledCodec(support_size=50_257).bytes_per_token(12) == 60 + 6 + 10


def test_a_vocabulary_of_one_token_has_no_tail() -> None:
    codec = SampledCodec(support_size=1, num_draws=3)
    decoded = codec.decode(stored_by(codec, np.zeros((2, 1), np.float32))[0], 3.0)
    assert decoded.log_probs.tolist() == [[0.0], [0.0]]
    assert np.isneginf(decoded.tail_log_prob).all()


def test_no_positions() -> None:
    codec = SampledCodec(support_size=70_000, num_draws=3)
    reduced = reduce_sampled(
        realistic_logits(2, 9), np.ones((2, 3), int), temperatures=codec.temperatures,
        draw_temperature=1.0,
    )  # fmt: skip
    stored = codec.expand(codec.encode(reduced[0:0]))
    assert codec.decode(stored, 1.0).log_probs.shape == (0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_draws": 256}, "--num-draws 256 cannot be stored: give 1 to 255"),
        ({"num_draws": 0}, "--num-draws 0 cannot be stored"),
        ({"draw_temperature": 1.2}, r"temperature 1.2 is not of the grid .*\(1,1.5,2,3,4\)"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SampledCodec(support_size=9, **change)


def test_only_temperatures_of_the_grid() -> None:
    codec = SampledCodec(support_size=9)
    assert codec_from(codec.settings) == codec
    stored = stored_by(codec, realistic_logits(2, 9))[0]
    for temperature in (0.5, 1.2, 5.0):
        with pytest.raises(UserError, match=f"temperature {temperature:g} is not of the grid"):
            codec.decode(stored, temperature)
