from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import ShardPlan, documents_per_shard

_SIZES = st.integers(1, 50)


@given(st.integers(0, 500), _SIZES)
def test_shards_partition_the_corpus_in_order(num_documents: int, per_shard: int) -> None:
    plan = ShardPlan(num_documents=num_documents, documents_per_shard=per_shard)
    shards = [range(*plan.documents(shard_idx)) for shard_idx in range(len(plan))]
    assert [document for shard in shards for document in shard] == list(range(num_documents))
    assert all(len(shard) == per_shard for shard in shards[:-1])
    assert all(len(shard) > 0 for shard in shards)


@given(st.integers(0, 500), st.integers(0, 500), _SIZES)
def test_more_documents_change_the_last_shard_only(few: int, more: int, per_shard: int) -> None:
    before = ShardPlan(num_documents=few, documents_per_shard=per_shard)
    after = ShardPlan(num_documents=few + more, documents_per_shard=per_shard)
    for shard_idx in range(len(before) - 1):
        assert before.documents(shard_idx) == after.documents(shard_idx)


@given(st.floats(1, 1e9), st.integers(1, 1000), st.integers(1, 5000))
def test_a_shard_stays_within_both_bounds(size: float, shard_mb: int, most: int) -> None:
    found = documents_per_shard(size, shard_mb=shard_mb, max_documents=most)
    assert 1 <= found <= most
    assert found == 1 or found * size <= shard_mb * 1e6
    assert found == most or (found + 1) * size > shard_mb * 1e6


@pytest.mark.parametrize(("shard_mb", "most"), [(0, 5), (5, 0), (-1, -1)])
def test_a_shard_of_nothing_is_refused(shard_mb: int, most: int) -> None:
    with pytest.raises(UserError, match="holds nothing: give at least 1 of each"):
        documents_per_shard(100, shard_mb=shard_mb, max_documents=most)
