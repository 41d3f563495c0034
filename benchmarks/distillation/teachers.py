"""How sure a teacher is of text that it was fine-tuned on, and of text that it was not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teacher_cache.cache.plan import LABELED
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.training.measures import classification_metrics


@dataclass(frozen=True, kw_only=True)
class Sureness:
    """A teacher on some labelled texts.

    Attributes:
        texts: which.
        num_texts: how many.
        accuracy: share of the texts.
        nll: mean nats.
        confidence: mean probability of its own choice.
    """

    texts: str
    num_texts: int
    accuracy: float
    nll: float
    confidence: float


def sureness(texts: str, logits: np.ndarray, labels: np.ndarray) -> Sureness:
    """From a teacher's logits [N, C] of texts with labels [N]."""
    found = classification_metrics(logits, labels)
    wide = logits.astype(np.float64)
    log_probs = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    return Sureness(
        texts=texts,
        num_texts=len(labels),
        accuracy=found["accuracy"],
        nll=found["nll"],
        confidence=float(np.exp(log_probs.max(axis=1)).mean()),
    )


def on_cached(texts: str, cache: Path) -> Sureness:
    """On the labelled texts of a cache."""
    reader = CacheReader(cache, LABELED)
    return sureness(texts, reader.column("class_logits"), reader.column("label"))
