"""Slow, obvious float64 versions of what capture reduces to, and realistic logits to reduce."""

from __future__ import annotations

import numpy as np

from teacher_cache.cache.codecs.dense import ReducedDense
from teacher_cache.cache.codecs.sampled import ReducedSampled
from teacher_cache.cache.codecs.topk import ReducedTopK


def realistic_logits(num: int, num_ids: int, *, seed: int = 0) -> np.ndarray:
    """[N, V] float32: Zipf's law in a random order, its steepness another at each position."""
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(num_ids) for _ in range(num)]) + 1
    steepness = rng.uniform(0.8, 2.5, (num, 1))
    logits = -steepness * np.log(ranks) + rng.normal(0, 0.7, ranks.shape) + 9
    return logits.astype(np.float32)


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Along the last axis, float64."""
    return values - log_sum_exp(values)[..., None]


def log_sum_exp(values: np.ndarray) -> np.ndarray:
    """Along the last axis, float64; -inf of nothing."""
    wide = values.astype(np.float64)
    with np.errstate(divide="ignore"):
        largest = wide.max(-1, keepdims=True, initial=-1e300)
        return (largest + np.log(np.exp(wide - largest).sum(-1, keepdims=True)))[..., 0]


def reduce_topk(
    logits: np.ndarray,
    *,
    top_k: int,
    temperatures: tuple[float, ...],
    next_ids: np.ndarray | None = None,
    top_p: float | None = None,
) -> ReducedTopK:
    """Head and tail of logits [N, V], position by position."""
    rows: dict[str, list[np.ndarray]] = {}
    for position, row in enumerate(logits.astype(np.float64)):
        below = row - row.max()
        order = np.lexsort((np.arange(len(row)), -row))
        head = order[:top_k]
        size = top_k
        if top_p is not None:
            mass = np.cumsum(np.exp(log_softmax(below)[head]))
            size = min(top_k, 1 + int((mass < top_p).sum()))
        tail = np.delete(below, head[:size])
        tail = tail[~np.isneginf(tail)]
        scaled = [tail / temperature for temperature in temperatures]
        one = {
            "ids": head,
            "below_max": below[head],
            "tail_r": np.array([log_sum_exp(part) if len(part) else -np.inf for part in scaled]),
            "tail_m": np.array([np.exp(log_softmax(part)) @ tail for part in scaled]),
            "sizes": np.array(size),
            **_always(below, -1 if next_ids is None else int(next_ids[position])),
        }
        for name, value in one.items():
            rows.setdefault(name, []).append(np.asarray(value))
    arrays = {name: np.stack(values) for name, values in rows.items()}
    arrays["below_max"] = arrays["below_max"].astype(np.float32)
    if top_p is None:
        del arrays["sizes"]
    return ReducedTopK(**arrays)


def reduce_sampled(
    logits: np.ndarray,
    draws: np.ndarray,
    *,
    temperatures: tuple[float, ...],
    draw_temperature: float,
) -> ReducedSampled:
    """What is kept of ids [N, D] drawn from logits [N, V]."""
    below = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    shape = draws.shape
    ids, counts = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    sizes = np.zeros(len(draws), np.int64)
    for position, drawn in enumerate(draws):
        found, times = np.unique(drawn, return_counts=True)
        sizes[position] = len(found)
        ids[position, : len(found)], counts[position, : len(found)] = found, times
    always = [_always(row, -1) for row in below]
    return ReducedSampled(
        ids=ids,
        counts=counts,
        log_probs=np.take_along_axis(log_softmax(below / draw_temperature), ids, 1),
        sizes=sizes,
        lse=np.stack([log_sum_exp(below / temperature) for temperature in temperatures], -1),
        **{name: np.array([one[name] for one in always]) for name in ("top1_log_prob",)},
        next_log_prob=np.array([one["next_log_prob"] for one in always]),
    )


def reduce_dense(logits: np.ndarray) -> ReducedDense:
    """Logits [N, V] relative to the largest."""
    below = logits - logits.max(-1, keepdims=True)
    always = [_always(row.astype(np.float64), -1) for row in below]
    return ReducedDense(
        below_max=below,
        top1_log_prob=np.array([one["top1_log_prob"] for one in always]),
        next_log_prob=np.array([one["next_log_prob"] for one in always]),
    )


def _always(below: np.ndarray, next_id: int) -> dict[str, float]:
    log_probs = log_softmax(below)
    inside = next_id < len(below)
    found = float(log_probs[next_id]) if next_id >= 0 and inside else 0.0 if inside else -np.inf
    return {"top1_log_prob": float(log_probs.max()), "next_log_prob": found}
