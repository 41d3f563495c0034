from __future__ import annotations

from fractions import Fraction
from itertools import islice, pairwise
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    BothKinds,
    CachedSamples,
    SampleCollator,
    alternate,
    batches_per_epoch,
    held_out,
)


class Numbered:
    """Samples that are their own number, of random lengths."""

    def __init__(self, num: int, seed: int = 0):
        self.lengths = np.random.default_rng(seed).integers(1, 50, size=num)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"number": position}


def order(num_labeled: int, num_unlabeled: int, **changes: Any) -> list[list[int]]:
    """All batches of positions: labelled samples first, unlabelled ones behind."""
    data = BothKinds(Numbered(num_labeled), Numbered(num_unlabeled, 1) if num_unlabeled else None)
    given: dict[str, Any] = {"batch_size": 4, "num_batches": 30, "unlabeled_ratio": 1.0, "seed": 0}
    return list(AlternatingBatches(data, **(given | changes)))


# Ratios that are exact in binary, so that the definition has no rounding of its own.
@given(
    sixteenths=st.integers(1, 64),
    num_batches=st.integers(0, 200),
)
def test_the_kinds_follow_the_ratio_at_every_point(sixteenths: int, num_batches: int) -> None:
    ratio = Fraction(sixteenths, 16)
    kinds = list(alternate(num_batches, float(ratio)))
    assert len(kinds) == num_batches
    labeled_at = [at for at, is_labeled in enumerate(kinds) if is_labeled]
    for num_labeled, at in enumerate(labeled_at):
        # Before labelled batch i stand i labelled ones and floor(i r) unlabelled ones.
        assert at == num_labeled + floor(num_labeled * ratio)
    num_labeled = len(labeled_at)
    assert num_batches - num_labeled <= floor(num_labeled * ratio)


def test_one_of_each_by_default() -> None:
    assert list(alternate(5, 1.0)) == [True, False, True, False, True]


def test_without_unlabelled_samples_the_ratio_is_nothing() -> None:
    assert all(position < 10 for batch in order(10, 0) for position in batch)


@settings(max_examples=30)
@given(
    num_labeled=st.integers(1, 60),
    num_unlabeled=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    ratio=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 3),
)
def test_each_kind_is_used_up_before_it_is_shuffled_anew(
    num_labeled: int, num_unlabeled: int, batch_size: int, ratio: float, seed: int
) -> None:
    changes = {"batch_size": batch_size, "unlabeled_ratio": ratio, "seed": seed}
    batches = order(num_labeled, num_unlabeled, num_batches=80, **changes)
    for lowest, num in ((0, num_labeled), (num_labeled, num_unlabeled)):
        mine = [batch for batch in batches if lowest <= batch[0] < lowest + num]
        assert all(lowest <= position < lowest + num for batch in mine for position in batch)
        per_epoch = -(-num // batch_size)
        epochs = [mine[at : at + per_epoch] for at in range(0, len(mine), per_epoch)]
        for epoch in epochs:
            seen = [position for batch in epoch for position in batch]
            assert len(set(seen)) == len(seen)
            if len(epoch) == per_epoch:
                assert sorted(seen) == list(range(lowest, lowest + num))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_an_epoch_ends_when_every_labelled_sample_was_seen_once(ratio: float) -> None:
    num_batches = batches_per_epoch(30, batch_size=4, unlabeled_ratio=ratio)
    batches = order(30, 20, num_batches=num_batches, unlabeled_ratio=ratio)
    labeled = [position for batch in batches for position in batch if position < 30]
    assert sorted(labeled) == list(range(30))


def test_the_order_depends_on_the_seed_alone() -> None:
    assert order(30, 20) == order(30, 20)
    assert order(30, 20) != order(30, 20, seed=1)
    # A longer training begins as the shorter one: where it resumes is a number of batches.
    assert order(30, 20, num_batches=60)[:30] == order(30, 20)


def test_a_sampler_begins_anew_each_time() -> None:
    # The Trainer iterates again when it resumes, and skips what was done.
    batches = AlternatingBatches(
        BothKinds(Numbered(20)), batch_size=4, num_batches=8, unlabeled_ratio=1.0, seed=0
    )
    assert list(islice(batches, 3)) == list(batches)[:3]
    assert len(batches) == 8


def test_both_kinds_are_one_range() -> None:
    data = BothKinds(Numbered(3), Numbered(2))
    assert len(data) == 5
    assert [data[position]["number"] for position in range(5)] == [0, 1, 2, 0, 1]
    assert len(BothKinds(Numbered(3))) == 3


def test_unlabelled_samples_carry_no_label(tiny_cache: Path) -> None:
    reader = CacheReader(tiny_cache)
    chosen = np.array([7, 2])
    samples = CachedSamples(reader, chosen, labeled=True)
    assert samples[0]["label"] == reader.sample(7)["label"]
    assert samples.lengths.tolist() == [len(reader.sample(7)["input_ids"]), samples.lengths[1]]
    assert "label" not in CachedSamples(reader, chosen, labeled=False)[0]
    assert len(samples) == 2


def sample(num_tokens: int, label: int | None = None, num_classes: int = 0) -> dict[str, Any]:
    made: dict[str, Any] = {"input_ids": np.arange(1, num_tokens + 1, dtype=np.uint32)}
    if num_classes:
        made["class_logits"] = np.arange(num_classes, dtype=np.float32)
    if label is not None:
        made["label"] = np.int32(label)
    return made


def test_a_labelled_batch() -> None:
    batch = SampleCollator(pad_id=9)([sample(2, 1, 3), sample(4, 0, 3)])
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["teacher_logits"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert {name: values.dtype for name, values in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "teacher_logits": torch.float32,
    }


def test_pooled_states_are_stacked_as_cached() -> None:
    samples = [sample(2, 1, 3) | {"pooled": np.full(4, i, np.float16)} for i in range(2)]
    pooled = SampleCollator(0)(samples)["teacher_pooled"]
    assert (pooled.dtype, pooled.tolist()) == (torch.float16, [[0] * 4, [1] * 4])


def test_a_batch_has_what_its_samples_have() -> None:
    assert "labels" not in SampleCollator(0)([sample(2, None, 3)])
    assert "teacher_logits" not in SampleCollator(0)([sample(2, 1)])


IDS = st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50)


@given(ids=IDS, more=IDS, fraction=st.floats(0, 1))
def test_more_documents_move_no_sample_across(
    ids: list[bytes], more: list[bytes], fraction: float
) -> None:
    alone = held_out(ids, fraction)
    assert held_out(more + ids, fraction)[len(more) :].tolist() == alone.tolist()


def test_a_larger_share_only_adds() -> None:
    ids = [np.random.default_rng(number).bytes(16) for number in range(4000)]
    shares = [held_out(ids, fraction) for fraction in (0.0, 0.05, 0.3, 1.0)]
    assert [float(share.mean()) for share in shares] == pytest.approx([0, 0.05, 0.3, 1], abs=0.02)
    for smaller, larger in pairwise(shares):
        assert not (smaller & ~larger).any()
    assert held_out([], 0.5).tolist() == []
