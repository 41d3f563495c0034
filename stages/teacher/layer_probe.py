"""What storing a teacher's attention maps loses, measured on its first samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from teacher_cache.cache.codecs.attention import AttentionCodec, row_kl

NUM_POSITIONS = 1024


class HasIds(Protocol):
    """A sample of either task."""

    @property
    def input_ids(self) -> Any:
        """uint32 [S]."""
        ...


AnySample = TypeVar("AnySample", bound=HasIds)


def first_samples(samples: Sequence[AnySample]) -> list[AnySample]:
    """The first few, of `NUM_POSITIONS` positions or just above."""
    chosen: list[AnySample] = []
    num_positions = 0
    for sample in samples:
        if num_positions >= NUM_POSITIONS:
            break
        chosen.append(sample)
        num_positions += len(sample.input_ids)
    return chosen


class RowErrors:
    """A listener that compares each row of a map with what the cache gives back of it.

    Compared is with the exact map of the same mode: what the mean over heads or leaving out rows
    costs is no part of it.

    Args:
        attention: how maps are stored.
    """

    def __init__(self, attention: AttentionCodec):
        self._attention = attention
        self._sum = self._largest = 0.0
        self._num_rows = 0

    def __call__(self, name: str, sample: int, piece: int, values: Tensor) -> None:
        """Store and read a map again; other fields are stored exactly enough."""
        if name not in {spec.name for spec in self._attention.fields}:
            return
        exact = values.cpu().numpy()
        again = self._attention.decode(self._attention.encode(exact), exact.shape[-1])
        kl = row_kl(exact, again)
        self._sum += float(kl.sum())
        self._largest = max(self._largest, float(kl.max()))
        self._num_rows += kl.size

    def to_json(self) -> dict[str, Any]:
        """For the manifest: rows compared, their mean and largest KL in nats, to four digits."""
        return {
            "num_rows": self._num_rows,
            "row_kl": float(f"{self._sum / max(1, self._num_rows):.4g}"),
            "largest_row_kl": float(f"{self._largest:.4g}"),
        }
