"""Figures of a cache that its manifest does not hold: lengths, confidence, captured mass, bytes.

Lengths are of all samples; the others of some, evenly spaced over a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.interface import has_rows, rows_of
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import TOP1_LOG_PROB
from teacher_cache.stages.heads import recorded_head

NUM_SAMPLES = 512  # that are read of a split
NUM_DECODED = 16  # of those, whose heads are decoded
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Of a figure.

    Attributes:
        num: values.
        mean: of them.
        median: of them.
        p95: 95 of 100 are at most that.
        largest: of them.
        bins: (above this, up to this, how many), those of the ends that hold none left out.
    """

    num: int
    mean: float
    median: float
    p95: float
    largest: float
    bins: Sequence[tuple[float, float, int]]

    @classmethod
    def of(cls, values: np.ndarray, edges: Sequence[float]) -> Distribution:
        """Of at least one value, at least 0; the last edge bounds all."""
        which = np.minimum(np.searchsorted(edges, values, side="left"), len(edges) - 1)
        counts = np.bincount(which, minlength=len(edges)).tolist()
        held = np.flatnonzero(counts)
        bins = [
            (float(edges[i - 1]) if i else 0.0, float(edges[i]), counts[i])
            for i in range(held[0], held[-1] + 1)
        ]
        return cls(
            num=len(values),
            mean=float(values.mean()),
            median=float(np.median(values)),
            p95=float(np.percentile(values, 95)),
            largest=float(values.max()),
            bins=bins,
        )


@dataclass(frozen=True, kw_only=True)
class SplitFigures:
    """Of one split that holds samples.

    Attributes:
        num_read: samples of which all but the lengths are.
        lengths: tokens of a sample.
        confidence: the teacher's probability at T = 1 of what it finds most probable, of samples
            or, of a language model, of positions.
        captured_mass: probability inside the head, at the lowest temperature of the cache; None
            where nothing lies outside.
        bytes_per_sample: by field, before any compression.
    """

    num_read: int
    lengths: Distribution
    confidence: Distribution | None
    captured_mass: Distribution | None
    bytes_per_sample: dict[str, float]


def figures_of(reader: CacheReader) -> SplitFigures | None:
    """Read a split; None where it holds no sample.

    Raises:
        BadShardError: if a shard that is read is damaged.
        CheckFailed: if the head of cached states is.
    """
    num = len(reader)
    if not num:
        return None
    chosen = np.unique(np.linspace(0, num - 1, NUM_SAMPLES).astype(int))
    samples = [reader.sample(int(i)) for i in chosen]
    lengths = reader.lengths()
    powers = [2.0**i for i in range(int(np.ceil(np.log2(max(2, lengths.max())))) + 1)]
    names = [spec.name for spec in reader.manifest.schema]
    return SplitFigures(
        num_read=len(samples),
        lengths=Distribution.of(lengths, powers),
        confidence=None
        if (sure := _confidences(reader, samples)) is None
        else Distribution.of(sure, SHARES),
        captured_mass=_captured(reader, samples[:: max(1, len(samples) // NUM_DECODED)]),
        bytes_per_sample={
            name: float(np.mean([np.asarray(one[name]).nbytes for one in samples]))
            for name in names
        },
    )


def _confidences(
    reader: CacheReader, samples: Sequence[dict[str, np.ndarray]]
) -> np.ndarray | None:
    """Of positions, of classes, or of all labels' answers; None of numbers."""
    if TOP1_LOG_PROB in samples[0]:
        kept = []
        for one in samples:
            where = one["loss_mask"][has_rows(one)]
            kept.append(np.exp(one[TOP1_LOG_PROB].astype(np.float64)[where]))
        return np.minimum(np.concatenate(kept), 1.0)
    logits = np.stack([one["class_logits"] for one in samples]).astype(np.float64)
    return recorded_head(reader.manifest.settings).confidences(logits)


def _captured(reader: CacheReader, samples: Sequence[dict[str, np.ndarray]]) -> Distribution | None:
    if TOP1_LOG_PROB not in samples[0]:
        return None
    # A classifier is shown without torch.
    import torch

    from teacher_cache.stages.codecs.named import open_codec, plain_temperature

    codec = open_codec(reader)
    temperature = plain_temperature(codec)
    masses = []
    for sample in samples:
        counts = sample["loss_mask"]
        rows = {
            name: torch.from_numpy(np.array(field[counts]))
            for name, field in rows_of(codec, sample).items()
        }
        with torch.inference_mode():
            decoded = codec.decode(rows, temperature)
        if decoded.ids is None:
            return None
        masses.append(1.0 - np.exp(np.asarray(decoded.tail_log_prob, np.float64)))
    return Distribution.of(np.clip(np.concatenate(masses), 0.0, 1.0), SHARES)


def to_json(found: dict[str, SplitFigures]) -> dict[str, Any]:
    """By split, as `pipe inspect --json` writes them."""
    return {split: asdict(one) for split, one in found.items()}
