"""The teacher's states before its language-model head; the head itself lies in the cache once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.arrays import Array, cast, namespace
from teacher_cache.cache.codecs.dense import whole_support
from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS, Decoded, Reduced, Stored
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import FieldSpec, Schema, bytes_per_position

HIDDEN = "hidden"

Head = Callable[[Array], Array]
"""From states [..., D] to logits [..., V]; -inf excludes an id."""


@dataclass(frozen=True, kw_only=True)
class ReducedHidden(Reduced):
    """States of N positions.

    Attributes:
        hidden: [N, D], after the final norm.
    """

    hidden: np.ndarray


@dataclass(frozen=True, kw_only=True)
class HiddenCodec:
    """States in `2D + 4` bytes a token; logits are recomputed, so any temperature can be had.

    Attributes:
        support_size: V.
        width: D.
        head: of the teacher, given to the decoder; nothing else needs it.
    """

    support_size: int
    width: int
    head: Head | None = None

    @property
    def name(self) -> str:
        """`hidden`."""
        return "hidden"

    @property
    def settings(self) -> dict[str, Any]:
        """For manifest and fingerprint; the head is the teacher's, whose weights are in it."""
        return {"name": self.name, "support_size": self.support_size, "width": self.width}

    @property
    def fields(self) -> Schema:
        """The states, and what comes with every codec."""
        shape = ("S", self.width)
        return (FieldSpec(name=HIDDEN, dtype="float16", shape=shape), *EVERY_CODECS_FIELDS)

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Stored bytes a position; `entries` has no meaning here."""
        return bytes_per_position(self.fields)

    def encode(self, reduced: ReducedHidden) -> dict[str, np.ndarray]:
        """The stored fields of one sample's positions.

        Raises:
            UserError: if a state has a value that float16 does not hold.
        """
        largest = float(np.finfo(np.float16).max)
        fits = np.abs(reduced.hidden) <= largest  # no NaN does
        if not fits.all():
            raise UserError(
                f"{int((~fits).any(-1).sum())} of the teacher's states have values beyond "
                f"{largest:,.0f}, the most that float16 holds: make the cache with --codec topk"
            )
        return {HIDDEN: reduced.hidden.astype(np.float16), **reduced.stored()}

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As stored: a row a position."""
        return {spec.name: stored[spec.name] for spec in self.fields}

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        """Log-probs of the support at any temperature, through the head.

        Raises:
            ValueError: if the codec was made without a head.
        """
        if self.head is None:
            raise ValueError("hidden states decode through the teacher's head: give HiddenCodec it")
        logits = cast(self.head(cast(stored[HIDDEN], "float32")), "float64")
        return whole_support(logits - namespace(logits).amax(logits, -1)[..., None], temperature)
