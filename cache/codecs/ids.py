"""Token ids in two bytes, and heads of differing sizes.

Ids are u16 with the two higher bits in a plane of their own, four to a byte: a support of up to
65,536 ids needs no plane, one of up to 262,144 has it, a larger one takes u32. Heads of differing
sizes lie end to end on disk and are expanded to a row a position for decoding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, counting, namespace
from teacher_cache.cache.schema import Dimension, FieldSpec, Schema

LOW_IDS = 1 << 16
PLANE_IDS = 1 << 18
IDS_PER_BYTE = 4
EMPTY_ID = -1


def id_fields(
    name: str, support_size: int, shape: tuple[Dimension, ...], plane_shape: tuple[Dimension, ...]
) -> Schema:
    """The fields that hold ids below `support_size`: `name`, and `name`_high where it needs one."""
    if support_size > PLANE_IDS:
        return (FieldSpec(name=name, dtype="uint32", shape=shape),)
    low = FieldSpec(name=name, dtype="uint16", shape=shape)
    if support_size <= LOW_IDS:
        return (low,)
    return (low, FieldSpec(name=f"{name}_high", dtype="uint8", shape=plane_shape))


def pack_ids(name: str, ids: np.ndarray, support_size: int) -> dict[str, np.ndarray]:
    """Ids [..., K] as their fields; the plane is [..., ceil(K / 4)].

    Raises:
        ValueError: if an id is outside the support.
    """
    if ids.size and not (ids.min() >= 0 and ids.max() < support_size):
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, the support has {support_size}")
    if support_size > PLANE_IDS:
        return {name: ids.astype(np.uint32)}
    low = {name: (ids & (LOW_IDS - 1)).astype(np.uint16)}
    if support_size <= LOW_IDS:
        return low
    short = -ids.shape[-1] % IDS_PER_BYTE
    high = np.pad(ids >> 16, [(0, 0)] * (ids.ndim - 1) + [(0, short)])
    high = high.reshape(*ids.shape[:-1], high.shape[-1] // IDS_PER_BYTE, IDS_PER_BYTE)
    plane = (high << (2 * np.arange(IDS_PER_BYTE))).sum(-1)
    return {**low, f"{name}_high": plane.astype(np.uint8)}


def unpack_ids(low: Array, plane: Array | None) -> Array:
    """Ids [..., K] int64.

    Args:
        low: [..., K] u16, or u32 where there is no plane.
        plane: [..., ceil(K / 4)] u8, or None.
    """
    ids = cast(low, "int64")
    if plane is None:
        return ids
    xp = namespace(low)
    wide = cast(plane, "int64")
    high = xp.stack([(wide >> (2 * place)) & 3 for place in range(IDS_PER_BYTE)], -1)
    high = high.reshape(*plane.shape[:-1], plane.shape[-1] * IDS_PER_BYTE)
    return ids | (high[..., : low.shape[-1]] << 16)


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
