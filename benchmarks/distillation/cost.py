"""CPU time of a review: teacher and student on the very same batches of test reviews."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.timing import interleaved
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.models.inference import forward

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU time on one thread.

    Attributes:
        batch_size: reviews in a batch.
        num_reviews: in all batches.
        ms_per_review: median over the passes, of each model by name.
        passes_s: of each model, CPU seconds of each pass.
    """

    batch_size: int
    num_reviews: int
    ms_per_review: dict[str, float]
    passes_s: dict[str, tuple[float, ...]]

    def ratio(self, above: str, below: str) -> float:
        """CPU time of one model over another's."""
        return self.ms_per_review[above] / self.ms_per_review[below]


def measure(
    classifiers: Mapping[str, Classifier],
    documents: Sequence[Document],
    *,
    num_batches: int,
    num_repeats: int,
) -> Cost:
    """Time whole passes over batches of like length, all models in turn, after a pass to warm up.

    Args:
        classifiers: by name; each tokenises for itself, beforehand.
        documents: to take the batches from.
        num_batches: as many, evenly spaced from the longest reviews to the shortest.
        num_repeats: timed passes of each model.
    """
    batches = {
        name: _batches(classifier, documents, num_batches)
        for name, classifier in classifiers.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {
        name: partial(_pass_s, classifier, batches[name])
        for name, classifier in classifiers.items()
    }
    interleaved(runs, dict.fromkeys(runs, 1))
    passes = interleaved(runs, dict.fromkeys(runs, num_repeats))
    torch.set_num_threads(threads)
    num_reviews = len(next(iter(batches.values()))) * BATCH_SIZE
    return Cost(
        batch_size=BATCH_SIZE,
        num_reviews=num_reviews,
        ms_per_review={
            name: 1000 * statistics.median(times) / num_reviews for name, times in passes.items()
        },
        passes_s=passes,
    )


def _batches(
    classifier: Classifier, documents: Sequence[Document], num_batches: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Full batches, sorted by length as the product's inference sorts them, longest first."""
    samples = classifier.tokenize(list(documents))
    lengths = np.array([len(sample.input_ids) for sample in samples])
    order = np.argsort(-lengths, kind="stable")
    starts = np.arange(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE)
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, num_batches).round().astype(int))]
    batches = []
    for start in chosen:
        ids = [samples[idx].input_ids for idx in order[start : start + BATCH_SIZE]]
        padded, mask = pad_batch(ids, classifier.pad_id)
        batches.append((torch.from_numpy(padded), torch.from_numpy(mask)))
    return batches


def _pass_s(classifier: Classifier, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """CPU seconds of this process, not the clock's: what else runs here does not count."""
    started = time.process_time()
    for ids, mask in batches:
        forward(classifier.model, ids, mask, classifier.autocast)
    return time.process_time() - started
