"""The whole support: nothing is cut, and every temperature can be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, log_sum_exp_below_zero, namespace
from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS, Decoded, Reduced, Stored
from teacher_cache.cache.codecs.steps import LARGEST_HALF
from teacher_cache.cache.schema import FieldSpec, Schema, bytes_per_position

LOGITS = "dense_logits"


@dataclass(frozen=True, kw_only=True)
class ReducedDense(Reduced):
    """Logits of N positions.

    Attributes:
        below_max: [N, V] float32, z_i - z_max; -inf excludes an id.
    """

    below_max: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DenseCodec:
    """Logits in `2V + 4` bytes a token.

    They are stored relative to the largest, which no softmax can tell: f16 is then finest where
    the mass is.

    Attributes:
        support_size: V.
    """

    support_size: int

    @property
    def name(self) -> str:
        """`dense`."""
        return "dense"

    @property
    def settings(self) -> dict[str, Any]:
        """For manifest and fingerprint."""
        return {"name": self.name, "support_size": self.support_size}

    @property
    def fields(self) -> Schema:
        """The logits, and what comes with every codec."""
        shape = ("S", self.support_size)
        return (FieldSpec(name=LOGITS, dtype="float16", shape=shape), *EVERY_CODECS_FIELDS)

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Stored bytes a position; `entries` has no meaning here."""
        return bytes_per_position(self.fields)

    def encode(self, reduced: ReducedDense) -> dict[str, np.ndarray]:
        """The stored fields of one sample's positions."""
        below = reduced.below_max
        finite = np.maximum(below, -LARGEST_HALF)  # too small to matter is not excluded
        return {
            LOGITS: np.where(np.isneginf(below), below, finite).astype(np.float16),
            **reduced.stored(),
        }

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As stored: a row a position."""
        return {spec.name: stored[spec.name] for spec in self.fields}

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        """Log-probs of the support at any temperature."""
        return whole_support(cast(stored[LOGITS], "float64"), temperature)


def whole_support(below_max: Array, temperature: float) -> Decoded:
    """A head that is everything, so that nothing is left for a tail.

    Args:
        below_max: [..., V] float64, logits less their largest; -inf excludes an id.
        temperature: positive.

    Raises:
        ValueError: if it is not.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be positive")
    scaled = below_max / temperature
    lse = log_sum_exp_below_zero(scaled)
    log_probs = cast(scaled - lse[..., None], "float32")
    xp = namespace(log_probs)
    return Decoded(
        ids=None,
        log_probs=log_probs,
        tail_log_prob=xp.full_like(log_probs[..., 0], -xp.inf),
        temperature=temperature,
    )
