"""How much of the teacher reaches a student of another tokenizer, measured on cached samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.stages.join.aligned_sample import SampleAligner

NUM_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of the first samples of a cache.

    Attributes:
        positions: share of the student's positions at which the teacher's distribution is known.
        one_to_one: share at which both next tokens are the same bytes, too.
        chunks_a_token: chunks that both predict, for each of the student's next tokens.
        mass: mean of the teacher's mass that maps to the student's ids where it is known. Of a
            head without its tail it is a bound from below.
        num_tokens: of the student's next tokens, that this was measured on.
    """

    positions: float
    one_to_one: float
    chunks_a_token: float
    mass: float
    num_tokens: int

    @property
    def words(self) -> str:
        """In words, for a message."""
        return (
            f"on the first {self.num_tokens:,} tokens of its text, {self.positions:.1%} of the "
            f"student's positions have the teacher's distribution, of whose mass {self.mass:.1%} "
            "maps"
        )

    def to_json(self) -> dict[str, Any]:
        """As a run records it."""
        return {name: round(value, 4) for name, value in vars(self).items()}


def measure(
    samples: Sequence[Mapping[str, np.ndarray]],
    codec: AnyCodec,
    aligner: SampleAligner,
    head_ids: np.ndarray | None,
    *,
    temperature: float,
) -> Coverage:
    """Align some samples and count.

    Args:
        samples: as cached.
        codec: of the cache; one of hidden states with its head.
        aligner: of the two tokenizers.
        head_ids: `Alignment.head_ids`.
        temperature: one that the cache serves; 1 where it serves that.
    """
    num_tokens = num_positions = num_one_to_one = num_chunks = 0
    masses: list[float] = []
    for sample in samples:
        aligned = aligner(sample)
        has_next = np.zeros(len(aligned.segment), dtype=bool)
        has_next[:-1] = aligned.segment[1:] == aligned.segment[:-1]
        known = aligned.teacher_positions[aligned.teacher_positions >= 0]
        num_tokens += int(has_next.sum())
        num_positions += len(known)
        num_one_to_one += int(aligned.is_one_to_one.sum())
        num_chunks += len(aligned.teacher_chunks)
        masses += _mapped_mass(sample, codec, head_ids, known, temperature)
    return Coverage(
        positions=num_positions / max(1, num_tokens),
        one_to_one=num_one_to_one / max(1, num_tokens),
        chunks_a_token=num_chunks / max(1, num_tokens),
        mass=float(np.mean(masses)) if masses else 0.0,
        num_tokens=num_tokens,
    )


def _mapped_mass(
    sample: Mapping[str, np.ndarray],
    codec: AnyCodec,
    head_ids: np.ndarray | None,
    positions: np.ndarray,
    temperature: float,
) -> list[float]:
    """At each position, the mass of the ids that have a student's id."""
    expanded = codec.expand(sample)
    stored = {name: torch.from_numpy(field[positions]) for name, field in expanded.items()}
    decoded = codec.decode(stored, temperature)
    probs = torch.as_tensor(decoded.log_probs).exp()
    if head_ids is None:
        return probs.sum(dim=-1).tolist()
    is_known = torch.from_numpy(np.append(head_ids >= 0, False))  # an empty slot's -1 finds the end
    ids = decoded.ids
    has_id = is_known[: probs.shape[-1]] if ids is None else is_known[torch.as_tensor(ids)]
    return torch.where(has_id, probs, 0.0).sum(dim=-1).tolist()
