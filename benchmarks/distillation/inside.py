"""How far a trained student is inside from its teacher: its mixing matrices and its states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.evaluation.matched_attention import InsideOfRun
from teacher_cache.stages.losses.layers import attention_distance, pooled_distance
from teacher_cache.stages.student.scans.recorded import RecordedMixer
from teacher_cache.stages.training.batches import Batch
from teacher_cache.stages.training.layers import Transfer

BATCH_SIZE = 64  # even, so that a sample's number in its batch is as even as its own
RIDGE = 1e-3  # of the mean square of the student's states


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The distances of a row's students.

    Attributes:
        key: the row's.
        title: the row's.
        block: the row's.
        num_reviews: that they were measured on.
        map_kl: of each seed: nats from the teacher's row of a map to the student's, mean over rows
            and matched layers.
        even_kl: the same of rows that are spread evenly over what the student can reach.
        hidden: of each seed: 1 - cosine between the teacher's state and the best linear map of the
            student's, mean over positions and matched layers.
    """

    key: str
    title: str
    block: str
    num_reviews: int
    map_kl: tuple[float, ...]
    even_kl: float
    hidden: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Distances:
    """The same of one student."""

    num_reviews: int
    map_kl: float
    even_kl: float
    hidden: float


@torch.no_grad()
def distances(run: Path, cache: Path, num_reviews: int) -> Distances:
    """Measure one student.

    A student that was not trained to match states has no projection to the teacher's width, so
    every student's states go through a linear map that is fitted here, by ridge regression on the
    reviews of even numbers; the others are judged.

    Args:
        run: of a finished student.
        cache: of its teacher, over reviews that nobody learned from, with maps and states.
        num_reviews: how many of them, the first.
    """
    reader = CacheReader(cache)
    inside = InsideOfRun.of(run, reader, hidden=True)
    transfer = inside.layers.transfer(inside.position_map)
    samples = [reader.sample(idx) for idx in range(min(num_reviews, len(reader)))]
    rows: list[Tensor] = []
    states: dict[int, list[Pairs]] = {}
    for start in range(0, len(samples), BATCH_SIZE):
        batch = inside.batch(samples[start : start + BATCH_SIZE])
        outputs = inside.outputs(batch)
        rows += _row_distances(transfer, outputs.mixers, batch)
        for layer, pairs in _state_pairs(transfer, outputs.hidden_states, batch):
            states.setdefault(layer, []).append(pairs)
    map_kl, even_kl = torch.cat(rows, dim=1).double().mean(dim=1).tolist()
    fitted = [_through_fitted(_joined(pairs)) for pairs in states.values()]
    return Distances(
        num_reviews=len(samples),
        map_kl=map_kl,
        even_kl=even_kl,
        hidden=float(torch.cat(fitted).mean()),
    )


class Pairs(NamedTuple):
    """States of N positions: [N] parity of their sample's number, [N, D] and [N, D']."""

    parity: Tensor
    student: Tensor
    teacher: Tensor


def _row_distances(
    transfer: Transfer, mixers: Sequence[RecordedMixer], batch: Batch
) -> Iterator[Tensor]:
    """[2, N] of each layer's rows: the student's distance, and that of a row spread evenly."""
    for one in transfer.attention_rows(mixers, batch):
        assert one.teacher is not None, "there are samples"
        has_row = (one.teacher != 0).any(-1)
        compared = (one.student, one.allowed.to(one.student.dtype))
        yield torch.stack(
            [
                attention_distance(rows, one.teacher, one.allowed, loss="kl")[has_row]
                for rows in compared
            ]
        )


def _state_pairs(
    transfer: Transfer, states: Sequence[Tensor], batch: Batch
) -> Iterator[tuple[int, Pairs]]:
    """What each matched layer of the student puts out beside its teacher's, by layer."""
    assert transfer.hidden is not None, "they were asked for"
    sources = transfer.position_map.sources(batch["attention_mask"].bool())
    sample, position = (sources >= 0).nonzero(as_tuple=True)
    for pair, name in zip(transfer.hidden.pairs, transfer.hidden.fields, strict=True):
        student = states[pair.student + 1][sample, position]  # the first are before all layers
        teacher = batch[name][sample, sources[sample, position]]
        yield pair.student, Pairs(sample % 2, student.double(), teacher.double())


def _joined(pairs: Sequence[Pairs]) -> Pairs:
    return Pairs(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))


def _through_fitted(pairs: Pairs) -> Tensor:
    """1 - cosine of each odd sample's states, through what was fitted on the even ones."""
    is_fitted = pairs.parity == 0
    student = pairs.student[is_fitted]
    teacher = F.normalize(pairs.teacher[is_fitted], dim=-1)  # as the cosine sees it
    gram = student.T @ student
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    projection = torch.linalg.solve(gram + ridge, student.T @ teacher)
    return pooled_distance(pairs.student[~is_fitted] @ projection, pairs.teacher[~is_fitted])
