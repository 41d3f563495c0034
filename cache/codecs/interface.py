"""What every codec of a language-model teacher gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from teacher_cache.cache.codecs.arrays import Array
from teacher_cache.cache.schema import NEXT_LOG_PROB, TOP1_LOG_PROB, FieldSpec, Schema

Stored = Mapping[str, Array]
"""A codec's fields by name: of one sample, or padded to [B, S, ...]; numpy or torch."""

EVERY_CODECS_FIELDS: Schema = (
    FieldSpec(name=TOP1_LOG_PROB, dtype="float16", shape=("S",)),
    FieldSpec(name=NEXT_LOG_PROB, dtype="float16", shape=("S",)),
)


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What capture keeps of N positions, before it is coded; every array has N rows.

    Attributes:
        top1_log_prob: [N] nats at T = 1, of the whole support.
        next_log_prob: [N] nats at T = 1, of the real next token; 0 where there is none, -inf where
            it is outside the support.
    """

    top1_log_prob: np.ndarray
    next_log_prob: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.top1_log_prob)

    def __getitem__(self, positions: slice | np.ndarray) -> Self:
        """The same of some of the positions: a sample's, say."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        return type(self)(**{name: value[positions] for name, value in arrays.items()})

    def stored(self) -> dict[str, np.ndarray]:
        """The fields that come with every codec."""
        return {
            TOP1_LOG_PROB: self.top1_log_prob.astype(np.float16),
            NEXT_LOG_PROB: self.next_log_prob.astype(np.float16),
        }


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A teacher's distributions at one temperature: head and ghost sum to 1.

    Attributes:
        ids: [..., K] int64, distinct along K, -1 in an empty slot; None: the whole support, id i
            at place i.
        log_probs: [..., K] float32 nats; -inf in an empty slot or for an excluded id.
        tail_log_prob: [...] float32 nats, log of the mass outside the head; -inf for none.
        temperature: of these log-probs.
    """

    ids: Array | None
    log_probs: Array
    tail_log_prob: Array
    temperature: float


def has_rows(sample: Mapping[str, np.ndarray]) -> np.ndarray:
    """At which positions of a stored sample a codec keeps something, bool [S].

    Args:
        sample: with `loss_mask` and the codec's fields, of all its positions or of the counted ones
            alone.
    """
    counts = sample["loss_mask"]
    return counts if len(sample[TOP1_LOG_PROB]) < len(counts) else np.ones(len(counts), bool)


def rows_of(codec: Codec, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A stored sample's fields of a codec with a row a position, [S, ...]; 0 where none is kept."""
    rows, where = codec.expand(sample), has_rows(sample)
    if where.all():
        return rows
    found = {}
    for name, values in rows.items():
        found[name] = np.zeros((len(where), *values.shape[1:]), values.dtype)
        found[name][where] = values
    return found


class Codec(Protocol):
    """One way of storing a distribution over the support at each position.

    A frozen dataclass whose keywords are the settings but for the name.
    """

    @property
    def name(self) -> str:
        """As on the command line and in the manifest."""
        ...

    @property
    def support_size(self) -> int:
        """One more than the largest id of the support."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the stored values, for manifest and fingerprint."""
        ...

    @property
    def fields(self) -> Schema:
        """The fields of a sample that this codec adds."""
        ...

    def encode(self, reduced: Any) -> dict[str, np.ndarray]:
        """The stored fields of one sample's positions.

        Args:
            reduced: the codec's own kind of `Reduced`.

        Raises:
            UserError: if a value cannot be stored.
        """
        ...

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One sample's fields with a row for each position that has one, as `decode` wants them."""
        ...

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        """The distributions at a temperature, from expanded fields of numpy or torch."""
        ...

    def bytes_per_token(self, entries: float | None = None) -> float:
        """Stored bytes a position; `entries` is the mean head of a codec with ragged ones."""
        ...
