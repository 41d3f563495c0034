"""The head's log-probs below the maximum in a byte each.

A head is sorted, so what has to be stored are the gaps between neighbours. Those are coded as
`gap = range * (code / 254) ** 2`: small gaps finely, the largest exactly, and each relative to the
*decoded* neighbour above, so that no error is carried on. The sums of squared codes are integers:
every decoder gets the same bits. On the logits of a 135M model (K = 64, T = 1) the KL that this
costs is 3e-7 nats, where equal steps below the maximum cost 9e-6 and square-root ones 1.5e-5.
"""

from __future__ import annotations

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, namespace

LARGEST_CODE = 254
EXCLUDED = 255  # a slot whose logit is -inf
LARGEST_HALF = float(np.finfo(np.float16).max)


def encode_steps(
    below_max: np.ndarray, *, dither: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Code a head.

    Args:
        below_max: [..., K] nats, descending from 0; -inf excludes a slot and all behind it.
        dither: [..., K] in [0, 1), independent and evenly distributed: gaps are rounded up or down
            by them, so that what is decoded is right in the mean. None: to the nearest.

    Returns:
        Codes [..., K] u8 and the range [...] f16, nats: the largest gap.
    """
    excluded = np.isneginf(below_max)
    exact = np.maximum(below_max.astype(np.float64), -LARGEST_HALF)
    gaps = np.where(excluded[..., 1:], 0.0, exact[..., :-1] - exact[..., 1:])
    largest = gaps.max(axis=-1, initial=0.0)
    if dither is not None:  # room to make up for a neighbour that was rounded down
        largest *= 1 + 2 / LARGEST_CODE
    widest = largest.astype(np.float16)
    # Rounded up: from below, gap after gap of the largest size would fall short and add up.
    widest = np.where(widest < largest, np.nextafter(widest, np.float16(LARGEST_HALF)), widest)
    unit = np.where(widest > 0, widest.astype(np.float64), 1.0) / LARGEST_CODE**2
    codes = np.zeros(below_max.shape, np.uint8)
    total = np.zeros(below_max.shape[:-1], np.int64)  # of squared codes, down to this slot
    for slot in range(1, below_max.shape[-1]):
        wanted = np.maximum(-exact[..., slot] / unit - total, 0.0)
        code = _nearest(wanted) if dither is None else _by_chance(wanted, dither[..., slot])
        codes[..., slot] = code
        total += code**2
    return np.where(excluded, EXCLUDED, codes).astype(np.uint8), widest


def _nearest(wanted: np.ndarray) -> np.ndarray:
    """The codes whose squares are nearest."""
    code = np.clip(np.rint(np.sqrt(wanted)), 0, LARGEST_CODE).astype(np.int64)
    # Squares are not evenly spaced: the nearest root need not have the nearest square.
    lower = np.maximum(code - 1, 0)
    return np.where(np.abs(lower**2 - wanted) < np.abs(code**2 - wanted), lower, code)


def _by_chance(wanted: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """One of the two codes whose squares lie around, the nearer one more often."""
    lower = np.floor(np.sqrt(wanted)).astype(np.int64)
    is_upper = wanted - lower**2 > chance * (2 * lower + 1)
    return np.minimum(lower + is_upper, LARGEST_CODE)


def decode_steps(codes: Array, widest: Array) -> Array:
    """Nats below the maximum, [..., K] float64; -inf where a slot is excluded.

    Args:
        codes: [..., K] u8.
        widest: [...] f16.
    """
    xp = namespace(codes)
    wide = cast(codes, "int64")
    totals = cast(xp.cumsum(wide * wide, -1), "float64")
    below = -totals * (cast(widest, "float64") / LARGEST_CODE**2)[..., None]
    return xp.where(wide == EXCLUDED, -xp.inf, below)
