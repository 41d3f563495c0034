"""The most probable ids and the tail's mass, from logits or from heads that are cut again.

A sorted head is cut by taking its first ids as they are stored, and by adding what is cut to the
tail: so the ids that stay keep their probabilities. Of a teacher that is mapped to a student's ids,
where several map to one, the head's whole mass is right, and the shares within it as the probe
measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.ids import is_filled, pack_ids
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.temperatures import missing_temperature, require_within
from teacher_cache.cache.codecs.topk import (
    IDS,
    LOG_PROBS,
    RANGE,
    SIZES,
    TAIL_M,
    TAIL_R,
    VALUES,
    ReducedTopK,
    TopKCodec,
)
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NEXT_LOG_PROB, TOP1_LOG_PROB
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs.interface import Positions, Room, Sample, Unused
from teacher_cache.stages.codecs.reductions import (
    FAR_BELOW,
    Chunk,
    NextLogits,
    blocks_of_rows,
    head_and_next,
    in_chunks,
    joined,
    on_host,
    sorted_head,
    tail_statistics,
    tail_sums,
)
from teacher_cache.stages.tokens.mapped_teacher import project_logits
from teacher_cache.stages.tokens.support import MappedSupport, Support, require_finite

MANY_IDS = 2**13
"""From so many on, sums over all of them cost more than what stands around them."""


class TopKRoom(Room[TopKCodec]):
    """`topk`: a head and, for all others together, a ghost."""

    lacks = "it holds the most probable ids, and of all others only their mass"
    projects_in_place = True

    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> TopKCodec:
        """Mass that has no id is the tail's; there, and of few ids, sums are taken as ever."""
        is_fast = not has_unmatched and support_size >= MANY_IDS
        return TopKCodec(support_size=support_size, **given, version=2 if is_fast else 1)

    def former(self, codec: Codec, given: Mapping[str, Any]) -> Codec | None:
        """With the sums of the first version."""
        if not isinstance(codec, TopKCodec) or codec.version == 1:
            return None
        return replace(codec, version=1)

    def check_mapped(self, given: Mapping[str, Any], *, num_reached: int, num_student: int) -> None:
        """A head of ids that the teacher can say, and something left for what it says besides."""
        most = min(num_reached, num_student - 1)
        if most < 1:
            raise UserError(
                f"--align map finds {num_reached:,} of the teacher's byte strings among the "
                f"student's {num_student:,} ids, which leaves no head and no other outcome: leave "
                "--align out, or give another student"
            )
        top_k = given.get("top_k", TopKCodec.top_k)
        if top_k > most:
            raise UserError(
                f"--top-k {top_k} cannot be: {num_reached:,} of the student's "
                f"{num_student:,} ids have a string of the teacher's, and one outcome is left for "
                f"all others, so give 1 to {most:,}"
            )

    def reduce(
        self, codec: TopKCodec, support: Support, positions: Positions
    ) -> tuple[ReducedTopK, Unused]:
        """Heads, and the tail's statistics at every temperature, summed over the tail itself."""
        if codec.version > 1:
            return _by_rows(codec, support, positions)
        return in_chunks(
            lambda chunk: _chunk(codec, chunk), support, positions, reductions.CHUNK_ELEMENTS
        )

    def reduce_mapped(
        self, codec: TopKCodec, support: MappedSupport, positions: Positions
    ) -> tuple[ReducedTopK, Unused]:
        """The student's most probable ids, and as the tail all other mass, matched or not.

        Raises:
            UserError: if logits are not finite, or at a position no student id has any mass.
        """
        return in_chunks(
            lambda chunk: _mapped_chunk(codec, support, chunk),
            support.teacher,
            positions,
            reductions.CHUNK_ELEMENTS,
        )

    def grid(self, codec: TopKCodec) -> tuple[float, ...]:
        """At which the tail was summed."""
        return codec.temperatures

    def require_temperature(self, codec: TopKCodec, temperature: float) -> None:
        """Anything within the grid: the tail is interpolated."""
        require_within(temperature, codec.temperatures)

    def missing(self, source: TopKCodec, target: TopKCodec) -> str | None:
        """More ids, mass, bytes or temperatures."""
        if target.top_k > source.top_k:
            return f"it holds {source.top_k} ids a position, fewer than --top-k {target.top_k}"
        if target.is_exact and not source.is_exact:
            return "its log-probs are rounded to a byte each, and --exact asks for two"
        if source.top_p is not None and (target.top_p is None or target.top_p > source.top_p):
            return f"its heads end at the mass {source.top_p:g}"
        return missing_temperature(source.temperatures, target.temperatures)

    def cut(self, source: TopKCodec, target: TopKCodec, sample: Sample) -> dict[str, np.ndarray]:
        """As this module's head says."""
        return cut_head(source, target, sample)


ROOM = TopKRoom()


def _chunk(codec: TopKCodec, chunk: Chunk) -> ReducedTopK:
    below = chunk.below_max
    ids = sorted_head(below, codec.top_k)
    head = below.gather(1, ids)
    sizes, kept = nucleus(codec, head - chunk.lse[:, None])
    always = chunk.always()
    below.scatter_(1, ids, torch.where(kept, -torch.inf, head))  # what is left is the tail
    tail_r, tail_m = tail_statistics(below, codec.temperatures)
    return ReducedTopK(
        ids=on_host(ids),
        below_max=on_host(head),
        tail_r=on_host(tail_r),
        tail_m=on_host(tail_m),
        sizes=None if sizes is None else on_host(sizes),
        **always,
    )


def _by_rows(
    codec: TopKCodec, support: Support, positions: Positions
) -> tuple[ReducedTopK, Unused]:
    """The second version: a few rows at a time, which stay in the device's cache."""
    parts: list[ReducedTopK] = []
    unused: list[np.ndarray] = []
    with torch.inference_mode():
        for where in blocks_of_rows(positions.logits):
            logits, next_ids = positions.logits[where], positions.next_ids[where]
            part, mass = _rows(codec, support, logits, next_ids.to(logits.device))
            parts.append(part)
            unused.append(mass)
    return joined(parts), np.concatenate(unused)


def _rows(
    codec: TopKCodec, support: Support, logits: Tensor, next_ids: Tensor
) -> tuple[ReducedTopK, Unused]:
    rows = support.selected(logits)
    ids, after = head_and_next(rows, codec.top_k)
    head = rows.gather(1, ids)
    first = head[:, 0]
    require_finite(first)
    nexts = NextLogits.of(rows, next_ids)
    has_tail = after != -torch.inf
    largest = after.where(has_tail, first)  # of the tail
    temperatures = tuple(dict.fromkeys((*codec.temperatures, 1.0)))
    rows.sub_(largest[:, None]).scatter_(1, ids, FAR_BELOW)
    tail_r, tail_m = tail_sums(rows, temperatures)
    apart = (largest - first).double()[:, None]
    tail_r = (tail_r + apart / tail_r.new_tensor(temperatures)).where(has_tail[:, None], -torch.inf)
    tail_m = (tail_m + apart).where(has_tail[:, None], 0.0)
    below = head - first[:, None]
    lse = torch.logaddexp(below.double().logsumexp(dim=1), tail_r[:, temperatures.index(1.0)])
    sizes, kept = nucleus(codec, (below - lse[:, None]).float())
    num = len(codec.temperatures)
    tail_r, tail_m = with_cut(
        tail_r[:, :num], tail_m[:, :num], below.double().masked_fill(kept, -torch.inf), codec
    )
    reduced = ReducedTopK(
        ids=on_host(ids),
        below_max=on_host(below),
        tail_r=on_host(tail_r),
        tail_m=on_host(tail_m),
        sizes=None if sizes is None else on_host(sizes),
        top1_log_prob=on_host(-lse.float()),
        next_log_prob=on_host(nexts.log_probs(first, lse.float())),
    )
    return reduced, on_host(support.unused_mass(logits, first, lse.float()))


def with_cut(
    tail_r: Tensor, tail_m: Tensor, cut: Tensor, codec: TopKCodec
) -> tuple[Tensor, Tensor]:
    """Tails [N, G] with the ids of a head that a nucleus cuts off, [N, K], -inf at all others."""
    if codec.top_p is None:
        return tail_r, tail_m
    scaled = torch.stack([cut / temperature for temperature in codec.temperatures], dim=1)
    grown = torch.logaddexp(tail_r, scaled.logsumexp(dim=2))
    finite = grown.masked_fill(torch.isneginf(grown), 0.0)
    moments = ((scaled - finite[:, :, None]).exp() * cut.clamp(min=FAR_BELOW)[:, None]).sum(dim=2)
    mean = (tail_r - finite).exp() * tail_m + moments
    return grown, mean.masked_fill(torch.isneginf(grown), 0.0)


def nucleus(codec: TopKCodec, head: Tensor) -> tuple[Tensor | None, Tensor]:
    """How many slots of each head count, [N], None for all; and which, [N, K] bool.

    Args:
        codec: says the mass, if any.
        head: [N, K] log-probs at T = 1, descending.
    """
    if codec.top_p is None:
        return None, torch.ones_like(head, dtype=torch.bool)
    # As many as it takes to reach the mass: those before which it was not reached.
    sizes = 1 + (head.exp().cumsum(dim=1)[:, :-1] < codec.top_p).sum(dim=1)
    return sizes, torch.arange(codec.top_k, device=head.device) < sizes[:, None]


def _mapped_chunk(codec: TopKCodec, support: MappedSupport, chunk: Chunk) -> ReducedTopK:
    student_ids = support.student_ids.to(chunk.below_max.device)
    mapped, _ = project_logits(chunk.below_max, student_ids, num_rows=support.size)  # [n, V_s]
    ids = sorted_head(mapped, codec.top_k)
    head = mapped.gather(1, ids)
    first = head[:, 0]
    _refuse_nothing(first)
    sizes, kept = nucleus(codec, head)
    is_kept = torch.zeros_like(mapped, dtype=torch.bool).scatter_(1, ids, kept)
    is_member = is_kept.index_select(1, student_ids.clamp(min=0)) & (student_ids >= 0)  # [n, V_t]
    below = chunk.below_max - (first + chunk.lse)[:, None]  # the teacher's ids, below the head's
    tail = below.masked_fill(is_member, -torch.inf)
    tail_r, tail_m = tail_statistics(tail, codec.temperatures)
    below_first = head - first[:, None]
    if not support.is_one_to_one:
        true_r, true_m = tail_statistics(
            below.masked_fill_(~is_member, -torch.inf), codec.temperatures
        )
        found_r, found_m = tail_statistics(
            below_first.masked_fill(~kept, -torch.inf), codec.temperatures
        )
        tail_r += found_r - true_r
        tail_m = torch.where(torch.isneginf(tail_r), tail_m, tail_m + found_m - true_m)
    return ReducedTopK(
        ids=on_host(ids),
        below_max=on_host(below_first),
        tail_r=on_host(tail_r),
        tail_m=on_host(tail_m),
        sizes=None if sizes is None else on_host(sizes),
        first_log_prob=on_host(first),
        **chunk.always(),
    )


def _refuse_nothing(first: Tensor) -> None:
    nothing = torch.isneginf(first)
    if bool(nothing.any()):
        raise UserError(
            f"at {int(nothing.sum())} positions the teacher rules out every token that the student "
            "has a string of, so nothing is left to map: leave --align out, or give another student"
        )


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of a sample's positions, as they decode.

    Attributes:
        ids: [S, K] int64, -1 in an empty slot.
        below_max: [S, K] float64, z_i - z_max; -inf in an empty slot.
        sizes: [S], slots that are filled.
    """

    ids: np.ndarray
    below_max: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, codec: TopKCodec, rows: Mapping[str, np.ndarray]) -> Heads:
        """Of expanded fields, at the lowest temperature of the grid."""
        temperature = codec.temperatures[0]
        decoded = codec.decode(rows, temperature)
        assert decoded.ids is not None
        log_probs = decoded.log_probs.astype(np.float64)
        return cls(
            ids=decoded.ids,
            below_max=temperature * (log_probs - log_probs[:, :1]),
            sizes=(decoded.ids >= 0).sum(axis=1),
        )


def cut_head(
    source: TopKCodec, target: TopKCodec, stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The fields of a sample under a codec that keeps less.

    The values of the ids that stay are copied, not coded again, and what is cut goes to the tail:
    their probabilities stay what they were, up to the float16 of the tail.

    Args:
        source: that coded the fields.
        target: of at most its ids, mass and temperatures; exact only if the source is.
        stored: the sample's fields.
    """
    rows = source.expand(stored)
    heads = Heads.of(source, rows)
    sizes = _kept(target, heads, stored[TOP1_LOG_PROB].astype(np.float64))
    tail_r, tail_m = _grown_tail(source, target, rows, heads, sizes)
    always = {name: stored[name] for name in (TOP1_LOG_PROB, NEXT_LOG_PROB)}
    if source.is_exact and not target.is_exact:
        return _coded_again(target, heads, sizes, tail_r, tail_m, always)
    names = (LOG_PROBS,) if target.is_exact else (VALUES,)
    width = min(target.top_k, heads.ids.shape[1])
    values = {name: rows[name][:, :width] for name in names}
    ids, filled = heads.ids[:, :width], is_filled(sizes, width)
    if target.top_p is None:
        head = {**pack_ids(IDS, ids, target.support_size), **values}
    else:
        head = {
            SIZES: sizes.astype(np.uint16),
            **pack_ids(IDS, ids[filled], target.support_size),
            **{name: one[filled] for name, one in values.items()},
        }
    if not target.is_exact:
        head[RANGE] = stored[RANGE]
    return {
        **head,
        TAIL_R: tail_r.astype(np.float16),
        TAIL_M: tail_m.astype(np.float16),
        **always,
    }


def _kept(target: TopKCodec, heads: Heads, top1_log_prob: np.ndarray) -> np.ndarray:
    """[S], slots of each head that stay: at most K, and of these what the nucleus needs."""
    sizes = np.minimum(heads.sizes, target.top_k)
    if target.top_p is None:
        return sizes
    mass = np.exp(heads.below_max + top1_log_prob[:, None]).cumsum(axis=1)
    # As many as it takes to reach the mass: those before which it was not reached.
    return np.minimum(sizes, 1 + (mass[:, :-1] < target.top_p).sum(axis=1))


def _grown_tail(
    source: TopKCodec,
    target: TopKCodec,
    rows: Mapping[str, np.ndarray],
    heads: Heads,
    sizes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`r_T` and `m_T`, [S, G] float64, of the old tail and the ids that are cut.

    docs/maths.md, section 1.
    """
    is_cut = is_filled(heads.sizes, heads.ids.shape[1]) & ~is_filled(sizes, heads.ids.shape[1])
    below = np.where(is_cut, heads.below_max, -np.inf)
    finite = np.where(np.isneginf(below), 0.0, below)  # 0 * -inf is no number
    r, m = [], []
    for temperature in target.temperatures:
        idx = source.temperatures.index(temperature)
        old_r = rows[TAIL_R][:, idx].astype(np.float64)
        old_m = rows[TAIL_M][:, idx].astype(np.float64)
        weights = np.exp(below / temperature)
        mass = np.exp(old_r) + weights.sum(axis=1)
        mean = np.exp(old_r) * old_m + (weights * finite).sum(axis=1)
        is_empty = mass == 0
        safe = np.where(is_empty, 1.0, mass)
        r.append(np.where(is_empty, old_r, np.log(safe)))
        m.append(np.where(is_empty, old_m, mean / safe))
    unchanged = ~is_cut.any(axis=1)[:, None]
    kept = [source.temperatures.index(temperature) for temperature in target.temperatures]
    return (
        np.where(unchanged, rows[TAIL_R][:, kept], np.stack(r, axis=1)),
        np.where(unchanged, rows[TAIL_M][:, kept], np.stack(m, axis=1)),
    )


def _coded_again(
    target: TopKCodec,
    heads: Heads,
    sizes: np.ndarray,
    tail_r: np.ndarray,
    tail_m: np.ndarray,
    always: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Two bytes a value to one: the codec moves the tail by what that rounds off."""
    wide = target.top_k - heads.ids.shape[1]  # a nucleus may never have filled all of K
    pad = [(0, 0), (0, max(wide, 0))]
    below = np.pad(heads.below_max, pad, constant_values=-np.inf)[:, : target.top_k]
    reduced = ReducedTopK(
        ids=np.maximum(np.pad(heads.ids, pad)[:, : target.top_k], 0),
        below_max=below,
        tail_r=tail_r,
        tail_m=tail_m,
        sizes=None if target.top_p is None else sizes,
        top1_log_prob=always[TOP1_LOG_PROB].astype(np.float64),
        next_log_prob=always[NEXT_LOG_PROB].astype(np.float64),
    )
    return target.encode(reduced) | dict(always)
