"""What the codecs' reductions share: positions a few at a time, sorted heads, a tail's statistics.

A reduction takes raw logits [N, R] of N positions on the device and gives numpy arrays; nothing
that is [N, V] leaves the device but for `dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.interface import Reduced
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.codecs.interface import Positions, Unused
from teacher_cache.stages.tokens.support import Support

CHUNK_ELEMENTS = 2**24  # logits of the positions that are reduced together: 64 MB in float32

AnyReduced = TypeVar("AnyReduced", bound=Reduced)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some positions on the device.

    Attributes:
        below_max: [n, V] float32, z_i - z_max, -inf at what does not count; the chunk's own.
        lse: [n], logsumexp of it at T = 1.
        next_ids: [n] int64.
        start: of the chunk among all positions.
    """

    below_max: Tensor
    lse: Tensor
    next_ids: Tensor
    start: int

    def always(self) -> dict[str, np.ndarray]:
        """Log-probs of the first and of the real next token at T = 1."""
        size = self.below_max.shape[1]
        inside = (self.next_ids >= 0) & (self.next_ids < size)
        taken = self.next_ids.where(inside, torch.zeros_like(self.next_ids))
        found = self.below_max.gather(1, taken[:, None])[:, 0] - self.lse
        outside = torch.where(self.next_ids == NO_LABEL, 0.0, -torch.inf)
        return {
            "top1_log_prob": on_host(-self.lse),
            "next_log_prob": on_host(torch.where(inside, found, outside)),
        }


def in_chunks(
    reduce_chunk: Callable[[Chunk], AnyReduced],
    support: Support,
    positions: Positions,
    chunk_elements: int,
) -> tuple[AnyReduced, Unused]:
    """Reduce a few positions at a time, and join the results.

    Args:
        reduce_chunk: may write into its chunk.
        support: ids that count.
        positions: N of them.
        chunk_elements: logits in a chunk, at most, but for a single position's.

    Returns:
        The reductions as one, and [N] the mass of what the support leaves out.

    Raises:
        UserError: if logits are not finite.
    """
    parts: list[AnyReduced] = []
    unused: list[np.ndarray] = []
    with torch.inference_mode():
        for start, rows, nexts in _cut(positions, chunk_elements):
            below_max, outside = support.below_max(rows)
            chunk = Chunk(
                below_max=below_max,
                lse=below_max.logsumexp(dim=1),
                next_ids=nexts.to(rows.device),
                start=start,
            )
            parts.append(reduce_chunk(chunk))
            unused.append(on_host(outside))
    return joined(parts), np.concatenate(unused)


def joined(parts: Sequence[AnyReduced]) -> AnyReduced:
    """Reductions of consecutive positions as one; narrower heads get empty slots."""
    arrays = {
        field.name: [getattr(part, field.name) for part in parts]
        for field in fields(parts[0])
        if getattr(parts[0], field.name) is not None
    }
    return replace(parts[0], **{name: _stacked(found) for name, found in arrays.items()})


def on_host(tensor: Tensor) -> np.ndarray:
    """The values as a numpy array."""
    return tensor.cpu().numpy()


def _cut(positions: Positions, chunk_elements: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """At least one chunk, so that no positions give empty arrays."""
    logits, next_ids = positions.logits, positions.next_ids
    step = max(1, chunk_elements // logits.shape[1])
    for start in range(0, max(len(logits), 1), step):
        yield start, logits[start : start + step], next_ids[start : start + step]


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    return np.concatenate(
        [np.pad(array, [(0, 0), (0, width - array.shape[1])]) for array in arrays]
    )


def sorted_head(logits: Tensor, top_k: int) -> Tensor:
    """Ids [N, K] of the largest, descending; ties to the lower id, on every device alike.

    `torch.topk` finds the right values and any of the ids that share one.
    """
    num_ids = logits.shape[1]
    values, ids = logits.topk(min(top_k + 1, num_ids), dim=1)
    head_ids = ids[:, :top_k].sort(dim=1).values
    order = logits.gather(1, head_ids).sort(dim=1, descending=True, stable=True).indices
    head_ids = head_ids.gather(1, order)
    if top_k < num_ids:
        tied = values[:, top_k - 1] == values[:, top_k]  # which of the last is in, is not settled
        if bool(tied.any()):
            whole = logits[tied].sort(dim=1, descending=True, stable=True).indices
            head_ids[tied] = whole[:, :top_k]
    return head_ids


def tail_statistics(tail: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """`r_T` and `m_T` of docs/maths.md, section 1, both [N, G] float32.

    Args:
        tail: [N, V], z_i - z_max outside the head and -inf inside; overwritten.
        temperatures: G of them.
    """
    largest = tail.amax(dim=1)
    is_empty = torch.isneginf(largest)
    largest = largest.masked_fill(is_empty, 0.0)
    tail -= largest[:, None]
    lowest = torch.finfo(tail.dtype).min / 4
    finite = tail.clamp_(min=lowest)  # 0 * -inf is no number
    r, m = [], []
    buffer = torch.empty_like(tail)
    for temperature in temperatures:
        weights = torch.mul(finite, 1 / temperature, out=buffer).exp_()
        total = weights.sum(dim=1)
        mean = torch.einsum("nv,nv->n", weights, finite) / total
        r.append((total.log() + largest / temperature).masked_fill(is_empty, -torch.inf))
        m.append((mean + largest).masked_fill(is_empty, 0.0))
    return torch.stack(r, dim=1), torch.stack(m, dim=1)
