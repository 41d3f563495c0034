"""Draws from the teacher: an unbiased estimate of what is linear in its probabilities.

Random-sampling distillation (docs/maths.md, section 3): N draws with replacement from p at one
temperature, kept as distinct ids, counts and exact log-probs. Drawing at a higher temperature than
one trains at is the flatter proposal p ** tau, normalised (tau = T / draw temperature): the weights
make up for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, namespace
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
from teacher_cache.cache.codecs.steps import LARGEST_HALF
from teacher_cache.cache.codecs.temperatures import (
    DEFAULT_TEMPERATURES,
    check_temperatures,
    named,
)
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import FieldSpec, Schema, bytes_per_position

IDS, COUNTS, LOG_PROBS = "sampled_ids", "sampled_counts", "sampled_log_probs"
SIZES, LSE, UNMATCHED = "sampled_sizes", "sampled_lse", "sampled_unmatched"
MOST_DRAWS = 255  # of a count in u8
LEAST_TAIL = 2.0**-11
"""Of a head's mass, what rounding its log-probs to f16 cannot resolve."""


@dataclass(frozen=True, kw_only=True)
class ReducedSampled(Reduced):
    """Draws at N positions.

    Attributes:
        ids: [N, M] int64, distinct in the first `sizes` slots.
        counts: [N, M], how often each was drawn.
        log_probs: [N, M] nats, at the temperature of the draws, of the whole support.
        sizes: [N], distinct ids of a position.
        lse: [N, G], logsumexp over the support of (z_i - z_max) / T.
        unmatched: [N, G] nats, the log of the mass at T that no id of the support has; None where
            it has all. What was drawn of it has no slot.
    """

    ids: np.ndarray
    counts: np.ndarray
    log_probs: np.ndarray
    sizes: np.ndarray
    lse: np.ndarray
    unmatched: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class SampledCodec:
    """Distinct draws in 5 bytes each (and 2 bits above 65,536 ids), and `6 + 2G` bytes a token.

    Attributes:
        support_size: V.
        num_draws: N, at most 255.
        temperatures: the grid; only these can be trained at, for no slope of `lse` is kept.
        draw_temperature: of the grid, what is drawn from.
        has_unmatched: some of the mass has no id of the support, as when a teacher is mapped to a
            student's ids: it is stored at each temperature, in `2G` bytes more, and a draw that
            met it counts among the N but has no slot.

    Raises:
        UserError: for draws or a grid that cannot be.
    """

    support_size: int
    num_draws: int = 50
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES
    draw_temperature: float = 1.0
    has_unmatched: bool = False

    def __post_init__(self) -> None:
        check_temperatures(self.temperatures)
        if not 1 <= self.num_draws <= MOST_DRAWS:
            raise UserError(
                f"--num-draws {self.num_draws} cannot be stored: give 1 to {MOST_DRAWS}"
            )
        self.require_stored(self.draw_temperature)

    @property
    def name(self) -> str:
        """`sampled`."""
        return "sampled"

    @property
    def settings(self) -> dict[str, Any]:
        """For manifest and fingerprint."""
        return {
            "name": self.name,
            "support_size": self.support_size,
            "num_draws": self.num_draws,
            "temperatures": list(self.temperatures),
            "draw_temperature": self.draw_temperature,
            # Only where it is so: caches without it keep their fingerprint.
            **({"has_unmatched": True} if self.has_unmatched else {}),
        }

    @property
    def fields(self) -> Schema:
        """Ids, counts, log-probs and normalisers, and what comes with every codec."""
        entries, grid = entry_shape(SIZES), ("S", len(self.temperatures))
        unmatched = (FieldSpec(name=UNMATCHED, dtype="float16", shape=grid),)
        return (
            FieldSpec(name=SIZES, dtype="uint16", shape=("S",)),
            *id_fields(IDS, self.support_size, entries, plane_shape(SIZES)),
            FieldSpec(name=COUNTS, dtype="uint8", shape=entries),
            FieldSpec(name=LOG_PROBS, dtype="float16", shape=entries),
            FieldSpec(name=LSE, dtype="float16", shape=grid),
            *(unmatched if self.has_unmatched else ()),
            *EVERY_CODECS_FIELDS,
        )

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Stored bytes a position.

        Args:
            entries: mean distinct ids of a position; where not given, all draws.
        """
        return bytes_per_position(self.fields, self.num_draws if entries is None else entries)

    def encode(self, reduced: ReducedSampled) -> dict[str, np.ndarray]:
        """The stored fields of one sample's positions."""
        filled = is_filled(reduced.sizes, reduced.ids.shape[-1])
        # Both are finite for whatever can be drawn.
        log_probs = np.maximum(reduced.log_probs[filled], -LARGEST_HALF)
        unmatched: dict[str, np.ndarray] = {}
        if self.has_unmatched:
            assert reduced.unmatched is not None, "the mass of what no id means is known"
            unmatched[UNMATCHED] = reduced.unmatched.astype(np.float16)
        return {
            SIZES: reduced.sizes.astype(np.uint16),
            **pack_ids(IDS, reduced.ids[filled], self.support_size),
            COUNTS: reduced.counts[filled].astype(np.uint8),
            LOG_PROBS: log_probs.astype(np.float16),
            LSE: reduced.lse.astype(np.float16),
            **unmatched,
            **reduced.stored(),
        }

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A row a position, as wide as the most distinct ids: [S, M]."""
        sizes = stored[SIZES]
        return {
            **{spec.name: stored[spec.name] for spec in self.fields},
            **expand_ids(IDS, stored, sizes, self.support_size),
            COUNTS: expand_entries(stored[COUNTS], sizes),
            LOG_PROBS: expand_entries(stored[LOG_PROBS], sizes),
        }

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        """The drawn ids as a head beside a ghost, at a temperature of the grid.

        No tail is stored, so it is what the head leaves of 1: right to about 1e-3 of mass. What is
        linear in the teacher's probabilities is better estimated from the counts, without bias:
        `stages/losses/draws.py`.

        Raises:
            UserError: if the temperature is not on the grid.
        """
        self.require_stored(temperature)
        ids = unpack_ids(stored[IDS], stored.get(f"{IDS}_high"))
        drawn = cast(stored[LOG_PROBS], "float64")
        sizes = cast(stored[SIZES], "int64")
        xp, filled = namespace(drawn), is_filled(sizes, ids.shape[-1])
        from_lse, to_lse = (
            cast(stored[LSE][..., self.temperatures.index(one)], "float64")[..., None]
            for one in (self.draw_temperature, temperature)
        )
        below = self.draw_temperature * (drawn + from_lse)  # z - z_max
        log_probs = xp.where(filled, below / temperature - to_lse, -xp.inf)
        head, tail = with_ghost(log_probs, sizes == self.support_size)
        return Decoded(
            ids=masked_ids(ids, filled),
            log_probs=cast(head, "float32"),
            tail_log_prob=cast(tail, "float32"),
            temperature=temperature,
        )

    def require_stored(self, temperature: float) -> None:
        """Refuse a temperature whose normaliser was not stored.

        Raises:
            UserError: naming the grid.
        """
        if temperature not in self.temperatures:
            raise UserError(
                f"temperature {temperature:g} is not of the grid of the sampled cache "
                f"({named(self.temperatures)}), which nothing interpolates: give one of these, or "
                "make the cache again with --temperatures that has it"
            )


def with_ghost(log_probs: Array, is_whole: Array) -> tuple[Array, Array]:
    """Log-probs of head and ghost that sum to 1; rounding may take a head's own sum above 1.

    The ghost has at least `LEAST_TAIL`, less than float16's log-probs can tell: without any, a
    student that gives the rest some mass would be infinitely far in the reverse KL.

    Args:
        log_probs: [..., D] nats, -inf in empty slots.
        is_whole: [...] bool, whether the head is all that there is, and has no ghost.
    """
    xp = namespace(log_probs)
    head = xp.exp(log_probs).sum(-1)
    left = xp.where(head < 1 - LEAST_TAIL, 1 - head, LEAST_TAIL)
    tail = xp.where(is_whole, 0.0 * left, left)
    total = xp.log(head + tail)
    safe = xp.where(is_whole, xp.ones_like(tail), tail)
    log_tail = xp.where(is_whole, -xp.inf, xp.log(safe) - total)
    return log_probs - total[..., None], log_tail
