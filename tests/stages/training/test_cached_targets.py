"""Draws from a cache as targets: their weights, at the temperature of the draws and at others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.stages.losses.draws import SampledTargets
from teacher_cache.stages.training.targets import CachedTargets
from tests.cache.codecs.test_sampled import stored_by
from tests.reference_codecs import log_softmax, realistic_logits


def targets_of(
    codec: SampledCodec, logits: np.ndarray, temperature: float, *, seed: int = 0
) -> tuple[SampledTargets, np.ndarray]:
    """What training makes of what is stored, and the draws [N, D]."""
    stored, draws = stored_by(codec, logits, seed=seed)
    tensors = {name: torch.from_numpy(one) for name, one in stored.items()}
    targets = CachedTargets(
        codec=codec,
        stored=tensors,
        temperature=temperature,
        num_outcomes=codec.support_size,
    ).at_positions(slice(None))
    assert isinstance(targets, SampledTargets)
    return targets, draws


@settings(max_examples=40)
@given(
    num_ids=st.sampled_from([1, 2, 7, 300]),
    num_draws=st.integers(1, 255),
    draw_temperature=st.sampled_from([1.0, 2.0]),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    support_size=st.sampled_from([0, 70_000, 300_000]),
    seed=st.integers(0, 9),
)
def test_weights_are_counts_times_the_ratio_to_the_proposal(
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
    targets, draws = targets_of(codec, logits, temperature, seed=seed)
    weights = targets.weights().numpy()
    exact = log_softmax(logits.astype(np.float64) / temperature)
    proposed = log_softmax(logits.astype(np.float64) / draw_temperature)
    for position, drawn in enumerate(draws):
        ids, counts = np.unique(drawn, return_counts=True)
        size = len(ids)
        assert targets.ids[position].tolist()[:size] == ids.tolist()
        assert (weights[position, size:] == 0).all()
        wanted = counts / num_draws * np.exp(exact[position, ids] - proposed[position, ids])
        np.testing.assert_allclose(weights[position, :size], wanted, rtol=0.03)
    if draw_temperature == temperature:
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(("draw_temperature", "temperature"), [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)])
def test_weighted_means_are_unbiased(draw_temperature: float, temperature: float) -> None:
    """Of a function of the id, over many draws at one position, within its standard error."""
    num = 4000
    logits = np.repeat(realistic_logits(1, 40, seed=3), num, axis=0)
    codec = SampledCodec(
        support_size=40, num_draws=20, temperatures=(1.0, 2.0), draw_temperature=draw_temperature
    )
    targets, _ = targets_of(codec, logits, temperature)
    values = np.random.default_rng(0).normal(size=40)
    values[np.argsort(logits[0])[:20]] += 5  # what is rare matters: dropping it would show
    ids = targets.ids.numpy()
    found = (targets.weights().numpy() * np.where(ids >= 0, values[ids], 0)).sum(-1)
    exact = float(np.exp(log_softmax(logits[0].astype(np.float64) / temperature)) @ values)
    error = found.std() / num**0.5
    assert abs(found.mean() - exact) < 4 * error + 2e-3 * abs(exact)  # beside f16
    assert error < 0.2 * abs(exact)


def test_a_flatter_proposal_serves_high_temperatures_better() -> None:
    logits = realistic_logits(100, 1000)
    sizes = {}
    for draw_temperature in (1.0, 2.0):
        codec = SampledCodec(
            support_size=1000, temperatures=(1.0, 2.0), draw_temperature=draw_temperature
        )
        sizes[draw_temperature] = targets_of(codec, logits, 2.0)[0].num_effective().numpy()
    np.testing.assert_allclose(sizes[2.0], 50, rtol=1e-6)
    assert np.median(sizes[1.0]) < 25
