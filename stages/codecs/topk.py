"""Cut the sorted heads of a `topk` cache: fewer ids, fewer temperatures, a byte instead of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from teacher_cache.cache.codecs.ids import pack_ids
from teacher_cache.cache.codecs.ragged_heads import is_filled
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
from teacher_cache.cache.schema import NEXT_LOG_PROB, TOP1_LOG_PROB


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
