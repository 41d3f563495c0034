from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.order import BATCHES_PER_BUCKET, ShuffledBatches, shuffled_batches

_LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=300).map(np.array)
_BATCH_SIZES = st.integers(1, 7)


def _take(stream: ShuffledBatches, num_batches: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(iter(stream), num_batches)]


@settings(max_examples=50)
@given(_LENGTHS, _BATCH_SIZES, st.integers(0, 2**32), st.integers(0, 9))
def test_an_epoch_is_a_permutation(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> None:
    batches = shuffled_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    short = sum(len(batch) < batch_size for batch in batches)
    assert short <= 1, "buckets are whole batches, so only the last one can be short"


def test_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.arange(1, 101)

    def epoch(seed: int, number: int) -> list[list[int]]:
        found = shuffled_batches(lengths, batch_size=8, seed=seed, epoch=number)
        return [batch.tolist() for batch in found]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({str(epoch(*one)) for one in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


def test_the_order_stays_as_it_is() -> None:
    """A run that is resumed after an upgrade must go on in the order in which it began."""
    batches = shuffled_batches(np.array([3, 1, 2, 5, 4]), batch_size=2, seed=7, epoch=1)
    assert [batch.tolist() for batch in batches] == [[3], [1, 2], [0, 4]]


def test_batches_hold_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, size=2000)
    batches = shuffled_batches(lengths, batch_size=8, seed=0, epoch=0)
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 500 / BATCHES_PER_BUCKET * 2, "padding is what the buckets are there to save"
    means = [lengths[batch].mean() for batch in batches]
    assert np.corrcoef(means[1:], means[:-1])[0, 1] < 0.2, "and yet lengths come in random order"


@settings(max_examples=40)
@given(_LENGTHS, _BATCH_SIZES, st.integers(0, 2**32), st.integers(0, 200), st.integers(1, 60))
def test_resumes_at_the_next_batch(
    lengths: np.ndarray, batch_size: int, seed: int, num_done: int, num_more: int
) -> None:
    num_done = min(num_done, 3 * len(lengths))
    whole = ShuffledBatches(lengths, batch_size=batch_size, seed=seed)
    expected = _take(whole, num_done + num_more)

    first = ShuffledBatches(lengths, batch_size=batch_size, seed=seed)
    assert _take(first, num_done) == expected[:num_done]
    state = first.state_dict()
    resumed = ShuffledBatches(lengths, batch_size=batch_size, seed=seed + 1)
    resumed.load_state_dict(state)
    assert _take(resumed, num_more) == expected[num_done:]
    assert _take(first, num_more) == expected[num_done:], "a second iterator goes on, too"


def test_a_state_is_a_copy() -> None:
    stream = ShuffledBatches(np.ones(6), batch_size=2, seed=0)
    state = stream.state_dict()
    _take(stream, 2)
    assert state == {"seed": 0, "epoch": 0, "batch_idx": 0}
    assert stream.state_dict() == {"seed": 0, "epoch": 0, "batch_idx": 2}
    _take(stream, 2)
    assert stream.state_dict() == {"seed": 0, "epoch": 1, "batch_idx": 1}


def test_nothing_to_shuffle_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        ShuffledBatches(np.empty(0), batch_size=2, seed=0)
