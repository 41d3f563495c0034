"""Heads of differing sizes: a sample's entries end to end on disk, a row a position for decoding.

The size of each position's head is stored (u16, two bytes), not where it ends (u32, four): sizes
cannot contradict each other, and their sum is where the next begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, counting
from teacher_cache.cache.codecs.ids import pack_ids, unpack_ids
from teacher_cache.cache.schema import Dimension

EMPTY_ID = -1


def entry_shape(sizes: str) -> tuple[Dimension, ...]:
    """Of a field with one value an entry."""
    return (f"sum({sizes})",)


def plane_shape(sizes: str) -> tuple[Dimension, ...]:
    """Of a field with four entries a byte."""
    return (f"sum({sizes})/4",)


def is_filled(sizes: Array, width: int) -> Array:
    """[..., width] bool: True in the first `sizes` slots.

    Args:
        sizes: [...] of signed integers.
        width: K.
    """
    return counting(sizes, width) < sizes[..., None]


def expand_entries(entries: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A sample's entries [total, ...] as rows [S, K_max]; zeros behind each head, K_max at least 1.

    Args:
        entries: end to end.
        sizes: [S].
    """
    rows = np.zeros((len(sizes), int(sizes.max(initial=1))), entries.dtype)
    rows[is_filled(sizes.astype(np.int64), rows.shape[1])] = entries
    return rows


def expand_ids(
    name: str, stored: Mapping[str, np.ndarray], sizes: np.ndarray, support_size: int
) -> dict[str, np.ndarray]:
    """The fields of a sample's ids, a row a position: what a codec of fixed size stores."""
    plane = stored.get(f"{name}_high")
    ids = unpack_ids(stored[name], plane)
    return pack_ids(name, expand_entries(ids, sizes), support_size)


def masked_ids(ids: Array, filled: Array) -> Array:
    """Ids with -1 in every empty slot."""
    return ids * filled + (EMPTY_ID * ~filled)
