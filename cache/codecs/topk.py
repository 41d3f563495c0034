"""The K most probable ids with their log-probs, and the tail at each temperature of the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, log_sum_exp_below_zero, namespace
from teacher_cache.cache.codecs.ids import (
    entry_shape,
    expand_entries,
    expand_ids,
    id_fields,
    is_filled,
    masked_ids,
    pack_ids,
    plane_shape,
    unpack_ids,
)
from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS, Decoded, Reduced, Stored
from teacher_cache.cache.codecs.steps import LARGEST_HALF, decode_steps, encode_steps
from teacher_cache.cache.codecs.temperatures import (
    DEFAULT_TEMPERATURES,
    check_temperatures,
    interpolated,
)
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import Dimension, FieldSpec, Schema, bytes_per_position

IDS, VALUES, RANGE, LOG_PROBS = "topk_ids", "topk_values", "topk_range", "topk_log_probs"
SIZES, TAIL_R, TAIL_M = "topk_sizes", "tail_r", "tail_m"
LARGEST_TOP_K = 2**16 - 1  # of a size in u16


@dataclass(frozen=True, kw_only=True)
class ReducedTopK(Reduced):
    """Heads and tails of N positions.

    Attributes:
        ids: [N, K] int64, descending by logit, ties to the lower id.
        below_max: [N, K] float32, z_i - z_max; -inf excludes an id.
        tail_r: [N, G], logsumexp over the ids outside the head of (z_i - z_max) / T; -inf for none.
        tail_m: [N, G], the mean of z_i - z_max over the tail at T; 0 for none.
        sizes: [N], slots of the head that count, where a nucleus cuts it; None: all K.
        first_log_prob: [N] nats at T = 1, of the head's first id; None where that is
            `top1_log_prob`, as it is unless the head is of other ids than the teacher's.
    """

    ids: np.ndarray
    below_max: np.ndarray
    tail_r: np.ndarray
    tail_m: np.ndarray
    sizes: np.ndarray | None = None
    first_log_prob: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class TopKCodec:
    """Sorted heads in `3K (+ K/4 above 65,536 ids) + 6 + 4G` bytes a token.

    Head and ghost sum to 1 at every temperature. The tail is stored so that its *mass* beside the
    decoded head is the true one: of all values that the tail could have, that makes the KL least
    (its derivative by r_T is `q_tail - p_tail`), and the rounding of the head cannot shift mass.

    Attributes:
        support_size: V.
        top_k: K, at most V.
        temperatures: the grid, G of them.
        is_exact: log-probs in f16 instead of u8 steps: `4K (+ K/4) + 4 + 4G` bytes.
        version: 2 where the sums over the vocabulary were taken by powers of one exponential, which
            may move a stored tail or log-prob by a last place of float16; 1, as before, where
            each temperature had its own.
        top_p: keep of the K only the smallest head with at least this mass at T = 1, and its size
            (2 bytes); None keeps all K.

    Raises:
        UserError: for a K, a mass or a grid that cannot be.
    """

    support_size: int
    top_k: int = 64
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES
    is_exact: bool = False
    top_p: float | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_temperatures(self.temperatures)
        if self.version not in (1, 2):
            raise UserError(
                f"version {self.version} of the codec 'topk' is unknown to this release: take a "
                "newer one"
            )
        if not 1 <= self.top_k <= min(self.support_size, LARGEST_TOP_K):
            raise UserError(
                f"--top-k {self.top_k} cannot be: the teacher uses {self.support_size:,} ids, so "
                f"give 1 to {min(self.support_size, LARGEST_TOP_K):,}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g} is no share of mass: give one above 0, to 1")

    @property
    def name(self) -> str:
        """`topk`."""
        return "topk"

    @property
    def settings(self) -> dict[str, Any]:
        """For manifest and fingerprint."""
        return {
            "name": self.name,
            "support_size": self.support_size,
            "top_k": self.top_k,
            "temperatures": list(self.temperatures),
            "is_exact": self.is_exact,
            "top_p": self.top_p,
            # Only where it is so: caches of the first keep their fingerprint.
            **({"version": self.version} if self.version > 1 else {}),
        }

    @property
    def fields(self) -> Schema:
        """Ids, values and tails, and what comes with every codec."""
        ragged = self.top_p is not None
        shape: tuple[Dimension, ...] = entry_shape(SIZES) if ragged else ("S", self.top_k)
        plane = plane_shape(SIZES) if ragged else ("S", -(-self.top_k // 4))
        grid = ("S", len(self.temperatures))
        values = (
            (FieldSpec(name=LOG_PROBS, dtype="float16", shape=shape),)
            if self.is_exact
            else (
                FieldSpec(name=VALUES, dtype="uint8", shape=shape),
                FieldSpec(name=RANGE, dtype="float16", shape=("S",)),
            )
        )
        return (
            *((FieldSpec(name=SIZES, dtype="uint16", shape=("S",)),) if ragged else ()),
            *id_fields(IDS, self.support_size, shape, plane),
            *values,
            FieldSpec(name=TAIL_R, dtype="float16", shape=grid),
            FieldSpec(name=TAIL_M, dtype="float16", shape=grid),
            *EVERY_CODECS_FIELDS,
        )

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Stored bytes a position.

        Args:
            entries: mean ids of a head where a nucleus cuts it; K, the most, where not given.
        """
        return bytes_per_position(self.fields, self.top_k if entries is None else entries)

    def encode(self, reduced: ReducedTopK) -> dict[str, np.ndarray]:
        """The stored fields of one sample's positions."""
        values, head = self._encode_head(reduced)
        tail_r, tail_m = self._encode_tail(reduced, head)
        rows = {**pack_ids(IDS, reduced.ids, self.support_size), **values}
        if self.top_p is not None:
            assert reduced.sizes is not None, "a nucleus has sizes"
            filled = is_filled(reduced.sizes, self.top_k)
            rows = {
                SIZES: reduced.sizes.astype(np.uint16),
                **pack_ids(IDS, reduced.ids[filled], self.support_size),
                **{
                    name: one[filled] if one.shape == filled.shape else one
                    for name, one in values.items()
                },
            }
        return {**rows, TAIL_R: tail_r, TAIL_M: tail_m, **reduced.stored()}

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A row a position; [S, K_max] where a nucleus cut the heads."""
        rows = {spec.name: stored[spec.name] for spec in self.fields}
        if self.top_p is None:
            return rows
        sizes, values = stored[SIZES], LOG_PROBS if self.is_exact else VALUES
        return {
            **rows,
            **expand_ids(IDS, stored, sizes, self.support_size),
            values: expand_entries(stored[values], sizes),
        }

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        """Head and ghost at a temperature; they sum to 1 by construction.

        Raises:
            UserError: if the temperature is outside the grid.
        """
        tail_r = interpolated(stored[TAIL_R], stored[TAIL_M], self.temperatures, temperature)
        ids = unpack_ids(stored[IDS], stored.get(f"{IDS}_high"))
        below = self._below_max(stored)
        xp = namespace(below)
        if self.top_p is not None:
            filled = is_filled(cast(stored[SIZES], "int64"), below.shape[-1])
            ids, below = masked_ids(ids, filled), xp.where(filled, below, -xp.inf)
        head = below / temperature
        lse = xp.logaddexp(log_sum_exp_below_zero(head), tail_r)
        return Decoded(
            ids=ids,
            log_probs=cast(head - lse[..., None], "float32"),
            tail_log_prob=cast(tail_r - lse, "float32"),
            temperature=temperature,
        )

    def _below_max(self, stored: Stored) -> Array:
        if not self.is_exact:
            return decode_steps(stored[VALUES], stored[RANGE])
        log_probs = cast(stored[LOG_PROBS], "float64")
        return log_probs - log_probs[..., :1]

    def _encode_head(self, reduced: ReducedTopK) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The values' fields, and what they decode to: [N, K] float64 below the maximum."""
        below = reduced.below_max
        if self.is_exact:
            first = reduced.first_log_prob
            log_probs = below + (reduced.top1_log_prob if first is None else first)[:, None]
            finite = np.maximum(log_probs, -LARGEST_HALF)
            kept = np.where(np.isneginf(below), below, finite)
            values = {LOG_PROBS: kept.astype(np.float16)}
        else:
            if reduced.sizes is not None:  # what is cut must not widen the range
                last = np.take_along_axis(below, reduced.sizes[:, None] - 1, axis=1)
                below = np.maximum(below, last)
            codes, widest = encode_steps(below)
            values = {VALUES: codes, RANGE: widest}
        return values, self._below_max(values)

    def _encode_tail(self, reduced: ReducedTopK, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """r_T and its slope, moved by what rounding did to the head's own sum and slope."""
        true = reduced.below_max.astype(np.float64)
        if reduced.sizes is not None:
            filled = is_filled(reduced.sizes, self.top_k)
            true, head = np.where(filled, true, -np.inf), np.where(filled, head, -np.inf)
        tail_r, tail_m = reduced.tail_r.astype(np.float64), reduced.tail_m.astype(np.float64)
        for idx, temperature in enumerate(self.temperatures):
            tail_r[:, idx] += _log_sum(head, temperature) - _log_sum(true, temperature)
            tail_m[:, idx] += _mean(head, temperature) - _mean(true, temperature)
        has_tail = ~np.isneginf(reduced.tail_r)
        finite = np.maximum(tail_r, -LARGEST_HALF)
        return (
            np.where(has_tail, finite, -np.inf).astype(np.float16),
            np.where(has_tail, np.maximum(tail_m, -LARGEST_HALF), 0.0).astype(np.float16),
        )


def _log_sum(below: np.ndarray, temperature: float) -> np.ndarray:
    """[N] of heads [N, K], relative to their maximum."""
    return log_sum_exp_below_zero(below / temperature)


def _mean(below: np.ndarray, temperature: float) -> np.ndarray:
    """[N], the mean of heads [N, K] under their own softmax."""
    finite = np.maximum(below, -LARGEST_HALF)
    weights = np.exp(below / temperature)
    return (weights * finite).sum(-1) / weights.sum(-1)
