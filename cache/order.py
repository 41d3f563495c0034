"""Deterministic shuffles in batches of similar length, with a state to resume from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BATCHES_PER_BUCKET = 50


def shuffled_batches(
    lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """One epoch's batches: every sample once, samples of similar length together.

    A permutation is cut into buckets of 50 batches; each bucket is sorted by length (stable) and
    cut into batches, and all batches are shuffled. A function of its arguments alone.

    Args:
        lengths: [N] positions of each sample.
        batch_size: samples in a batch; the last batch of a bucket may be smaller.
        seed: of the run.
        epoch: 0, 1, ...

    Returns:
        Index arrays that together hold 0 to N - 1 once each.
    """
    generator = np.random.default_rng([seed, epoch])
    permutation = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    bucket_size = batch_size * BATCHES_PER_BUCKET
    for start in range(0, len(permutation), bucket_size):
        bucket = permutation[start : start + bucket_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches.extend(bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size))
    return [batches[batch_idx] for batch_idx in generator.permutation(len(batches))]


class ShuffledBatches:
    """An endless stream of shuffled epochs; `state_dict` names the next batch.

    Args:
        lengths: [N] positions of each sample, N > 0.
        batch_size: samples in a batch.
        seed: of the run.

    Raises:
        ValueError: if there are no samples: such a stream would never yield.
    """

    def __init__(self, lengths: np.ndarray, *, batch_size: int, seed: int):
        if not len(lengths):
            raise ValueError("there are no samples to shuffle")
        self._lengths = lengths
        self._batch_size = batch_size
        self._state = {"seed": seed, "epoch": 0, "batch_idx": 0}

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            state = self._state
            batches = shuffled_batches(
                self._lengths,
                batch_size=self._batch_size,
                seed=state["seed"],
                epoch=state["epoch"],
            )
            for batch_idx in range(state["batch_idx"], len(batches)):
                # Advanced before the batch is handed out: the state names the next one.
                self._state = {**state, "batch_idx": batch_idx + 1}
                yield batches[batch_idx]
            self._state = {**state, "epoch": state["epoch"] + 1, "batch_idx": 0}

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch and next batch."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict`'s place."""
        self._state = dict(state)
