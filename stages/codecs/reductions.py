"""What the codecs' reductions share: positions a few at a time, sorted heads, a tail's statistics.

A reduction takes raw logits [N, R] of N positions on the device and gives numpy arrays; nothing
that is [N, V] leaves the device but for `dense`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
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
        nexts = NextLogits.of(self.below_max, self.next_ids)
        return {
            "top1_log_prob": on_host(-self.lse),
            "next_log_prob": on_host(nexts.log_probs(torch.zeros_like(self.lse), self.lse)),
        }


@dataclass(frozen=True, kw_only=True)
class NextLogits:
    """The logits of the real next tokens, [n].

    Attributes:
        logits: of those that are inside the support.
        is_inside: which these are.
        outside: the log-prob of all others: 0 where there is no next token, else -inf.
    """

    logits: Tensor
    is_inside: Tensor
    outside: Tensor

    @classmethod
    def of(cls, logits: Tensor, next_ids: Tensor) -> NextLogits:
        """Of logits [n, V] and next ids [n]."""
        is_inside = (next_ids >= 0) & (next_ids < logits.shape[1])
        taken = next_ids.where(is_inside, torch.zeros_like(next_ids))
        return cls(
            logits=logits.gather(1, taken[:, None])[:, 0],
            is_inside=is_inside,
            outside=torch.where(next_ids == NO_LABEL, 0.0, -torch.inf),
        )

    def log_probs(self, largest: Tensor, lse: Tensor) -> Tensor:
        """[n] nats, of the largest logits and the logsumexp relative to them."""
        return torch.where(self.is_inside, self.logits - largest - lse, self.outside)


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
    """Ids [N, K] of the largest, descending; ties to the lower id, on every device alike."""
    return head_and_next(logits, top_k)[0]


def head_and_next(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`sorted_head`, and [N] the largest value outside it; -inf where it is all.

    `largest` finds the right values and any of the ids that share one.
    """
    num_ids = logits.shape[1]
    values, ids = largest(logits, min(top_k + 1, num_ids))
    head_ids = ids[:, :top_k].sort(dim=1).values
    order = logits.gather(1, head_ids).sort(dim=1, descending=True, stable=True).indices
    head_ids = head_ids.gather(1, order)
    if top_k < num_ids:
        tied = values[:, top_k - 1] == values[:, top_k]  # which of the last is in, is not settled
        if bool(tied.any()):
            whole = logits[tied].sort(dim=1, descending=True, stable=True).indices
            head_ids[tied] = whole[:, :top_k]
        return head_ids, values[:, top_k]
    return head_ids, torch.full_like(values[:, 0], -torch.inf)


BLOCK = 64  # columns whose largest value is looked at first


def largest(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The largest values [N, num], descending, and the id of each: any of those that share one.

    What is among the largest lies in one of as many blocks of columns, those of the largest maxima:
    all others hold nothing above the least of these. So one pass finds the blocks, and a few
    thousand values are left to be sorted.
    """
    num_blocks = logits.shape[1] // BLOCK
    if num_blocks < 4 * num or not len(logits):
        values, ids = logits.topk(num, dim=1)
        return values, ids
    blocked = logits[:, : num_blocks * BLOCK].unflatten(1, (num_blocks, BLOCK))
    rest = logits[:, num_blocks * BLOCK :]
    chosen = blocked.amax(dim=2).topk(num, dim=1, sorted=False).indices
    inside = torch.arange(BLOCK, device=logits.device)
    ids = (chosen[:, :, None] * BLOCK + inside).flatten(1)
    behind = torch.arange(num_blocks * BLOCK, logits.shape[1], device=logits.device)
    found = blocked.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, places = torch.cat([found, rest], dim=1).topk(num, dim=1)
    ids = torch.cat([ids, behind.expand(len(logits), -1)], dim=1)
    return values, ids.gather(1, places)


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


ROWS_ELEMENTS = 2**22  # logits of the rows that are summed together on a CPU
TILE_ELEMENTS = 2**17  # of them at a time, which stay in its cache
LARGEST_POWER = 24
FAR_BELOW = -1e30  # nats; exp gives 0, and 0 times it is no NaN


def blocks_of_rows(logits: Tensor) -> Iterator[slice]:
    """Of positions, a few at a time; one block at least, so that none give empty arrays."""
    step = _rows_of_a_block(logits)
    for start in range(0, max(len(logits), 1), step):
        yield slice(start, start + step)


def _rows_of_a_block(logits: Tensor) -> int:
    few = ROWS_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS // 4
    return max(1, few // logits.shape[1])


def _tile_width(logits: Tensor) -> int:
    """By the vocabulary alone: however many rows there are, a row is summed in one order."""
    width = logits.shape[1]
    if logits.device.type != "cpu":
        return width
    return min(width, max(1024, TILE_ELEMENTS // _rows_of_a_block(logits)))


def tail_sums(tail: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """`r_T` and `m_T` of docs/maths.md, section 1, relative to the largest, both [N, G] float64.

    One exponential of each value, whose powers are those of all temperatures where 1/T are small
    multiples of one number: each is off by what float32 rounds off times its power, 12 at most on
    the default grid. A tile of columns at a time, without copies of whole rows.

    Args:
        tail: [N, V] float32, at most 0 and somewhere 0, at most `FAR_BELOW` at what is not of it;
            overwritten.
        temperatures: G of them.
    """
    steps = ladder(temperatures)
    num, width = tail.shape
    tile = _tile_width(tail)
    totals = tail.new_zeros((2, len(temperatures), num), dtype=torch.float64)
    buffers = tail.new_empty((2, len(temperatures), num * tile))
    for start in range(0, width, tile):
        values = tail[:, start : start + tile].clamp(min=FAR_BELOW)
        weights, products = buffers[..., : values.numel()].unflatten(2, values.shape)
        _exponentials(values, temperatures, steps, weights)
        totals[0] += weights.sum(dim=2)
        totals[1] += torch.mul(weights, values, out=products).sum(dim=2)
    return totals[0].T.log(), (totals[1] / totals[0]).T


def ladder(temperatures: tuple[float, ...]) -> tuple[float, tuple[int, ...]] | None:
    """A number of which all 1/T are multiples, and which; None where they are no small ones."""
    exact = [Fraction(one).limit_denominator(LARGEST_POWER) for one in temperatures]
    if any(float(fraction) != one for fraction, one in zip(exact, temperatures, strict=True)):
        return None
    whole = math.lcm(*(fraction.numerator for fraction in exact))
    powers = [int(whole / fraction) for fraction in exact]
    common = math.gcd(*powers)
    powers = [power // common for power in powers]
    return (common / whole, tuple(powers)) if max(powers) <= LARGEST_POWER else None


def _exponentials(
    values: Tensor,
    temperatures: tuple[float, ...],
    steps: tuple[float, tuple[int, ...]] | None,
    out: Tensor,
) -> None:
    """exp(values / T) of each temperature, [G, N, C]."""
    if steps is None:
        for place, temperature in enumerate(temperatures):
            torch.mul(values, 1 / temperature, out=out[place]).exp_()
        return
    unit, powers = steps
    known = {1: torch.mul(values, unit).exp_()}
    for power in sorted(powers):
        place = out[powers.index(power)]
        known[power] = _power(known, power, place)


def _power(known: dict[int, Tensor], power: int, out: Tensor) -> Tensor:
    """By as few products as a sum of two known powers, or halving, takes."""
    if power in known:
        return out.copy_(known[power])
    for first in sorted(known, reverse=True):
        if power - first in known:
            return torch.mul(known[first], known[power - first], out=out)
    half = power // 2
    known[half] = _power(known, half, torch.empty_like(out)) if half not in known else known[half]
    torch.mul(known[half], known[half], out=out)
    return out.mul_(known[1]) if power % 2 else out
