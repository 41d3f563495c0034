"""What numpy arrays and torch tensors share, so that one decoder serves both (no torch here)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

Array = Any  # a numpy array or a torch tensor


def namespace(array: Array) -> Any:
    """The module whose functions take this array: numpy, or the library that made it."""
    return np if isinstance(array, np.ndarray) else importlib.import_module("torch")


def cast(array: Array, dtype: str) -> Array:
    """The array in another number format; torch cannot index or shift with u16 and u32."""
    if isinstance(array, np.ndarray):
        return array.astype(dtype)
    return array.to(getattr(namespace(array), dtype))


def counting(like: Array, stop: int) -> Array:
    """0 to stop - 1 as int64, where `like` lies."""
    if isinstance(like, np.ndarray):
        return np.arange(stop)
    return namespace(like).arange(stop, device=like.device)


def log_sum_exp_below_zero(values: Array) -> Array:
    """Log-sum-exp along the last axis of values that are at most 0 and somewhere near it.

    Relative to the maximum, so nothing overflows, and the sum is at least about 1.
    """
    xp = namespace(values)
    return xp.log(xp.exp(values).sum(-1))
