from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.stages.data.collation import length_sorted_batches, pad_batch

_SEQUENCES = st.lists(
    st.lists(st.integers(0, 2**32 - 1), max_size=9).map(lambda ids: np.array(ids, dtype=np.uint32)),
    min_size=1,
    max_size=6,
)


def test_pads_on_the_right():
    input_ids, attention_mask = pad_batch([np.array([5, 6, 7]), np.array([8])], pad_id=9)
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert (input_ids.dtype, attention_mask.dtype) == (np.int64, np.bool_)


@given(_SEQUENCES)
def test_padding_loses_and_adds_nothing(sequences):
    input_ids, attention_mask = pad_batch(sequences, 3)
    assert input_ids.shape == attention_mask.shape == (len(sequences), max(map(len, sequences)))
    for row, mask, sequence in zip(input_ids, attention_mask, sequences, strict=True):
        assert row[mask].tolist() == sequence.tolist()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert set(row[~mask].tolist()) <= {3}


def test_refuses_nothing_to_pad():
    with pytest.raises(ValueError, match="expected at least one sequence"):
        pad_batch([], 0)


@given(st.lists(st.integers(0, 600), max_size=40), st.integers(1, 2000))
def test_batches_hold_every_sample_once_within_the_budget(lengths, max_tokens):
    batches = length_sorted_batches(lengths, max_tokens=max_tokens)
    indices = [idx for batch in batches for idx in batch.tolist()]
    assert sorted(indices) == list(range(len(lengths)))
    assert indices == sorted(indices, key=lambda idx: (-lengths[idx], idx))
    for batch in batches:
        padded = max(lengths[idx] for idx in batch) * len(batch)
        assert padded <= max_tokens or len(batch) == 1


@given(st.lists(st.integers(1, 600), max_size=40), st.integers(1, 2000))
def test_no_batch_could_have_taken_the_next_sample(lengths, max_tokens):
    batches = length_sorted_batches(lengths, max_tokens=max_tokens)
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > max_tokens


def test_longest_first():
    batches = length_sorted_batches([2, 9, 4, 4], max_tokens=8)
    assert [batch.tolist() for batch in batches] == [[1], [2, 3], [0]]


def test_refuses_an_empty_budget():
    with pytest.raises(ValueError, match="positive"):
        length_sorted_batches([1], max_tokens=0)
