"""Draws from the teacher: an unbiased estimate of what is linear in its probabilities.

Random-sampling distillation (docs/maths.md, section 3), in two versions. The first: N draws with
replacement from p at one temperature, kept as distinct ids, counts and exact log-probs. The second:
distinct ids, of which as many as are kept none estimate better. Drawing at a higher temperature
than one trains at is the flatter proposal p ** tau, normalised (tau = T / draw temperature): the
weights make up for it.
"""

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
    named,
)
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import FieldSpec, Schema, bytes_per_position

IDS, COUNTS, LOG_PROBS = "sampled_ids", "sampled_counts", "sampled_log_probs"
SIZES, LSE, UNMATCHED = "sampled_sizes", "sampled_lse", "sampled_unmatched"
HEADS, VALUES, RANGE = "sampled_heads", "sampled_values", "sampled_range"
TAIL_R = "sampled_tail_r"
MOST_DRAWS = 255  # of a count in u8
MOST_IDS = 255  # of a head's size in u8
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
        require_on_grid(self.draw_temperature, self.temperatures)

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
        require_on_grid(temperature, self.temperatures)
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


def require_on_grid(temperature: float, temperatures: tuple[float, ...]) -> None:
    """Refuse a temperature whose normaliser was not stored.

    Raises:
        UserError: naming the grid.
    """
    if temperature not in temperatures:
        raise UserError(
            f"temperature {temperature:g} is not of the grid of the sampled cache "
            f"({named(temperatures)}), which nothing interpolates: give one of these, or "
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


@dataclass(frozen=True, kw_only=True)
class ReducedDistinct(Reduced):
    """Distinct ids at N positions, most probable first, ties to the lower id.

    Attributes:
        ids: [N, M] int64.
        below_max: [N, M] float32 nats, z_i - z_max of the whole support; -inf in an empty slot.
        num_heads: [N], the first ids of each, which were certain to be kept.
        tail_r: [N, G], logsumexp over all ids but the head's of (z_i - z_max) / T; -inf for none.
        rounding: [N, M] in [0, 1), by which what is stored is rounded up or down.
        unmatched: [N, G] nats, as of `ReducedSampled`.
    """

    ids: np.ndarray
    below_max: np.ndarray
    num_heads: np.ndarray
    tail_r: np.ndarray
    rounding: np.ndarray
    unmatched: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class DistinctCodec:
    """Version 2: M distinct ids in `3M (+ M/4 above 65,536 ids) + 7 + 2G` bytes a token.

    The M ids are drawn without replacement, each with its probability times a number of the
    position's own, or with certainty where that is 1 or more (docs/maths.md, section 3). Those that
    were certain are a head with exact probabilities, among them always the most probable; every
    other one stands for an equal part of the mass outside the head. So at the temperature of the
    draws head and parts sum to 1, and the log-probs' rounding to a byte cannot move a part.

    Attributes:
        support_size: V.
        num_ids: M, 2 to 255, at most V.
        temperatures: the grid; only these can be trained at.
        draw_temperature: of the grid, at which the ids' probabilities count.
        has_unmatched: as of `SampledCodec`; that mass is known, and takes no slot.

    Raises:
        UserError: for a number of ids or a grid that cannot be.
    """

    support_size: int
    num_ids: int = 32
    temperatures: tuple[float, ...] = DEFAULT_TEMPERATURES
    draw_temperature: float = 1.0
    has_unmatched: bool = False

    def __post_init__(self) -> None:
        check_temperatures(self.temperatures)
        most = min(self.support_size, MOST_IDS)
        if not 2 <= self.num_ids <= most:
            raise UserError(
                f"--num-ids {self.num_ids} cannot be: the teacher uses {self.support_size:,} ids, "
                f"so give 2 to {most:,}"
            )
        require_on_grid(self.draw_temperature, self.temperatures)

    @property
    def name(self) -> str:
        """`sampled`."""
        return "sampled"

    @property
    def settings(self) -> dict[str, Any]:
        """For manifest and fingerprint."""
        return {
            "name": self.name,
            "version": 2,
            "support_size": self.support_size,
            "num_ids": self.num_ids,
            "temperatures": list(self.temperatures),
            "draw_temperature": self.draw_temperature,
            **({"has_unmatched": True} if self.has_unmatched else {}),
        }

    @property
    def fields(self) -> Schema:
        """Ids, their log-probs, heads and tails, and what comes with every codec."""
        entries, grid = ("S", self.num_ids), ("S", len(self.temperatures))
        unmatched = (FieldSpec(name=UNMATCHED, dtype="float16", shape=grid),)
        return (
            *id_fields(IDS, self.support_size, entries, ("S", -(-self.num_ids // 4))),
            FieldSpec(name=VALUES, dtype="uint8", shape=entries),
            FieldSpec(name=RANGE, dtype="float16", shape=("S",)),
            FieldSpec(name=HEADS, dtype="uint8", shape=("S",)),
            FieldSpec(name=TAIL_R, dtype="float16", shape=grid),
            *(unmatched if self.has_unmatched else ()),
            *EVERY_CODECS_FIELDS,
        )

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Stored bytes a position, whatever the mean of its entries."""
        return bytes_per_position(self.fields, self.num_ids)

    def encode(self, reduced: ReducedDistinct) -> dict[str, np.ndarray]:
        """The stored fields of one sample's positions.

        Log-probs and tails are rounded up or down by chance, so that they are right in the mean.
        The tail's mass beside the *decoded* head is the true one. (The first log-prob is known, so
        its number rounds the tails.)
        """
        codes, widest = encode_steps(reduced.below_max, dither=reduced.rounding)
        in_head = is_filled(reduced.num_heads, self.num_ids)
        true = np.where(in_head, reduced.below_max.astype(np.float64), -np.inf)
        found = np.where(in_head, decode_steps(codes, widest), -np.inf)
        true[:, 0] = found[:, 0] = 0.0  # of a position without a head, whose tail is none either
        moved = [
            log_sum_exp_below_zero(found / temperature) - log_sum_exp_below_zero(true / temperature)
            for temperature in self.temperatures
        ]
        tail_r = reduced.tail_r + np.stack(moved, axis=1)
        unmatched: dict[str, np.ndarray] = {}
        if self.has_unmatched:
            assert reduced.unmatched is not None, "the mass of what no id means is known"
            unmatched[UNMATCHED] = _rounded_by_chance(reduced.unmatched, reduced.rounding[:, 0])
        return {
            **pack_ids(IDS, reduced.ids, self.support_size),
            VALUES: codes,
            RANGE: widest,
            HEADS: reduced.num_heads.astype(np.uint8),
            TAIL_R: _rounded_by_chance(tail_r, reduced.rounding[:, 0]),
            **unmatched,
            **reduced.stored(),
        }

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As they are: every position has as many slots."""
        return {spec.name: stored[spec.name] for spec in self.fields}

    def kept(self, stored: Stored, temperature: float) -> KeptIds:
        """The ids with what each stands for, at a temperature of the grid.

        Raises:
            UserError: if the temperature is not on the grid.
        """
        below = decode_steps(stored[VALUES], stored[RANGE])
        xp, num_heads = namespace(below), cast(stored[HEADS], "int64")
        filled, in_head = below != -xp.inf, is_filled(num_heads, self.num_ids)
        log_probs, log_tail = self._log_probs(stored, below, in_head, temperature)
        drawn, drawn_tail = log_probs, log_tail
        if temperature != self.draw_temperature:
            drawn, drawn_tail = self._log_probs(stored, below, in_head, self.draw_temperature)
        # At the temperature of the draws: an equal part of the tail each, whatever their bytes say.
        num_parts = cast((filled & ~in_head).sum(-1), "float64")
        part = drawn_tail - xp.log(xp.where(num_parts > 0, num_parts, 1.0))
        safe = xp.where(filled, drawn, 0.0)
        of_part = part[..., None] + xp.where(filled, log_probs, 0.0) - safe
        ids = unpack_ids(stored[IDS], stored.get(f"{IDS}_high"))
        return KeptIds(
            ids=masked_ids(ids, filled),
            log_probs=log_probs,
            log_weights=xp.where(in_head, log_probs, xp.where(filled, of_part, -xp.inf)),
            is_whole=(log_tail == -xp.inf) & (not self.has_unmatched),
        )

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        """All kept ids as a head, and a ghost for what they leave of 1.

        Raises:
            UserError: if the temperature is not on the grid.
        """
        kept = self.kept(stored, temperature)
        head, tail = with_ghost(kept.log_probs, kept.is_whole)
        return Decoded(
            ids=kept.ids,
            log_probs=cast(head, "float32"),
            tail_log_prob=cast(tail, "float32"),
            temperature=temperature,
        )

    def _log_probs(
        self, stored: Stored, below: Array, in_head: Array, temperature: float
    ) -> tuple[Array, Array]:
        """[..., M] nats of the ids, and [...] of all but the head's, float64."""
        require_on_grid(temperature, self.temperatures)
        xp, place = namespace(below), self.temperatures.index(temperature)
        scaled = below / temperature
        tail_r = cast(stored[TAIL_R][..., place], "float64")
        head = log_sum_exp_below_zero(xp.where(in_head, scaled, -xp.inf))
        # Of a position at which no id was to be had, nothing is finite.
        log_z = xp.where(in_head.any(-1), xp.logaddexp(head, tail_r), 0.0)
        if self.has_unmatched:
            log_z = log_z - xp.log1p(-xp.exp(cast(stored[UNMATCHED][..., place], "float64")))
        return scaled - log_z[..., None], tail_r - log_z


@dataclass(frozen=True, kw_only=True)
class KeptIds:
    """Distinct ids at one temperature, float64 nats.

    Attributes:
        ids: [..., M] int64, -1 in an empty slot.
        log_probs: [..., M]; -inf in an empty slot.
        log_weights: [..., M], the log of the mass that each stands for.
        is_whole: [...] bool, whether there is nothing beside the head.
    """

    ids: Array
    log_probs: Array
    log_weights: Array
    is_whole: Array


def _rounded_by_chance(values: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """float16, up or down so that its mean over `chance` is the value; -inf stays.

    Args:
        values: [N, G], at most about 0.
        chance: [N], evenly distributed in [0, 1).
    """
    finite = np.maximum(values.astype(np.float64), 1 - LARGEST_HALF)
    near = finite.astype(np.float16)
    lower = np.where(near > finite, np.nextafter(near, np.float16(-LARGEST_HALF)), near)
    upper = np.nextafter(lower, np.float16(np.inf))
    low, high = lower.astype(np.float64), upper.astype(np.float64)
    rounded = np.where(finite - low > chance[:, None] * (high - low), upper, lower)
    return np.where(np.isneginf(values), np.float16(-np.inf), rounded).astype(np.float16)


def sampled_codec(*, version: int = 1, **settings: Any) -> SampledCodec | DistinctCodec:
    """The codec of a cache's settings.

    Raises:
        UserError: if this release does not know the version.
    """
    versions = {1: SampledCodec, 2: DistinctCodec}
    if version not in versions:
        raise UserError(
            f"version {version} of the codec 'sampled' is unknown to this release: take a newer one"
        )
    return versions[version](**settings)
