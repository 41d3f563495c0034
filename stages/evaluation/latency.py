"""How long one document takes, by length."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch

from teacher_cache.stages.evaluation.classifier import Classifier
from teacher_cache.stages.inference import forward

NUM_REPEATS = 9


def measure_latency(
    classifiers: list[Classifier], lengths: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """Milliseconds of one forward pass of one document; medians of interleaved repeats.

    Args:
        classifiers: with distinct names.
        lengths: in tokens; one that a model has no positions for is left out for it.

    Returns:
        By name, by length.
    """
    generator = np.random.default_rng(0)
    found: dict[str, dict[int, float]] = {classifier.name: {} for classifier in classifiers}
    for length in lengths:
        timed = [one for one in classifiers if length <= one.num_positions]
        durations: dict[str, list[float]] = {one.name: [] for one in timed}
        for repeat in range(NUM_REPEATS + 1):
            for classifier in timed:
                ids = generator.integers(0, classifier.model.config.vocab_size, (1, length))
                duration = _time_forward(classifier, torch.from_numpy(ids))
                if repeat > 0:  # the first pass allocates
                    durations[classifier.name].append(1000 * duration)
        for name, values in durations.items():
            found[name][length] = median(values)
    return found


def _time_forward(classifier: Classifier, input_ids: torch.Tensor) -> float:
    input_ids = input_ids.to(classifier.model.device)
    mask = torch.ones_like(input_ids)
    started = time.perf_counter()
    forward(classifier.model, input_ids, mask, classifier.autocast).cpu()  # waits for the device
    return time.perf_counter() - started
