"""The codecs whose head is everything: dense and hidden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec, ReducedHidden
from teacher_cache.cache.codecs.interface import Decoded
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.errors import UserError
from tests.reference_codecs import log_softmax, realistic_logits, reduce_dense


def decoded_twice(codec: Any, stored: dict[str, np.ndarray], temperature: float) -> Decoded:
    found = codec.decode(stored, temperature)
    tensors = {name: torch.from_numpy(one) for name, one in stored.items()}
    on_torch = codec.decode(tensors, temperature)
    assert found.ids is None and on_torch.ids is None
    assert np.isneginf(found.tail_log_prob).all()
    assert np.array_equal(on_torch.tail_log_prob.numpy(), found.tail_log_prob)
    finite = ~np.isneginf(found.log_probs)
    assert np.array_equal(finite, ~np.isneginf(on_torch.log_probs.numpy()))
    np.testing.assert_array_max_ulp(
        found.log_probs[finite], on_torch.log_probs.numpy()[finite], maxulp=1
    )
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.7, 40.0])
def test_dense_logits_at_any_temperature(temperature: float) -> None:
    logits = realistic_logits(20, 300) + 500  # whose softmax does not know it
    logits[:, 7] = -np.inf
    logits[:, 9] = -1e30
    codec = DenseCodec(support_size=300)
    stored = codec.expand(codec.encode(reduce_dense(logits)))
    assert stored["dense_logits"].dtype == np.float16
    decoded = decoded_twice(codec, stored, temperature)
    exact = log_softmax(logits.astype(np.float64) / temperature)
    assert np.isneginf(decoded.log_probs[:, 7]).all()
    assert np.isfinite(decoded.log_probs[:, 9]).all()
    exact[:, [7, 9]] = 0
    p = np.exp(exact) * (np.arange(300) != 7) * (np.arange(300) != 9)
    kl = (p * (exact - np.where(p > 0, decoded.log_probs, 0))).sum(-1)
    assert abs(kl).mean() < 2e-6
    np.testing.assert_allclose(np.exp(decoded.log_probs.astype(np.float64)).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("num_ids", [1, 5])
def test_few_ids_and_no_positions(num_ids: int) -> None:
    codec = DenseCodec(support_size=num_ids)
    reduced = reduce_dense(np.zeros((2, num_ids), np.float32))
    assert codec.decode(codec.encode(reduced[0:0]), 1.0).log_probs.shape == (0, num_ids)
    found = codec.decode(codec.encode(reduced), 3.0).log_probs
    np.testing.assert_allclose(found, -np.log(num_ids), rtol=1e-6)
    with pytest.raises(ValueError, match="temperature is 0, but must be positive"):
        codec.decode(codec.encode(reduced), 0)


def _reduced(hidden: np.ndarray) -> ReducedHidden:
    zeros = np.zeros(len(hidden), np.float32)
    return ReducedHidden(hidden=hidden, top1_log_prob=zeros, next_log_prob=zeros)


def test_hidden_states_decode_through_the_head() -> None:
    rng = np.random.default_rng(0)
    weight, hidden = rng.normal(size=(50, 8)), rng.normal(size=(6, 8)).astype(np.float32)

    def head(states: Any) -> Any:
        wide = states.double() if isinstance(states, torch.Tensor) else states.astype(float)
        rows = torch.from_numpy(weight) if isinstance(states, torch.Tensor) else weight
        return wide @ rows.T

    codec = HiddenCodec(support_size=50, width=8, head=head)
    stored = codec.expand(codec.encode(_reduced(hidden)))
    decoded = decoded_twice(codec, stored, 1.3)
    exact = log_softmax(hidden.astype(np.float16).astype(float) @ weight.T / 1.3)
    np.testing.assert_allclose(decoded.log_probs, exact, rtol=1e-6)
    with pytest.raises(ValueError, match="decode through the teacher's head"):
        replace(codec, head=None).decode(stored, 1.0)


@pytest.mark.parametrize("value", [7e4, -7e4, np.nan, np.inf])
def test_a_state_that_f16_does_not_hold_is_refused(value: float) -> None:
    hidden = np.zeros((3, 2), np.float32)
    hidden[1, 0] = value
    with pytest.raises(UserError, match=r"1 of the teacher's states .* 65,504"):
        HiddenCodec(support_size=5, width=2).encode(_reduced(hidden))


def test_bytes_a_token() -> None:
    dense, hidden = DenseCodec(support_size=50_257), HiddenCodec(support_size=9, width=768)
    assert (dense.bytes_per_token(), hidden.bytes_per_token()) == (100_514 + 4, 1_536 + 4)
    stored = hidden.encode(_reduced(np.zeros((5, 768), np.float32)))
    assert sum(one.nbytes for one in stored.values()) == 5 * 1_540
    few = DenseCodec(support_size=7)
    stored = few.encode(reduce_dense(realistic_logits(5, 7)))
    assert sum(one.nbytes for one in stored.values()) == 5 * few.bytes_per_token()


@pytest.mark.parametrize(
    "codec", [DenseCodec(support_size=4), HiddenCodec(support_size=4, width=2)]
)
def test_settings_make_the_codec_again(codec: Any) -> None:
    assert codec_from(codec.settings) == codec
