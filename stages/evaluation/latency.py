"""How long one document takes, by length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch

from teacher_cache.stages.evaluation.models import EvaluatedModel
from teacher_cache.stages.models.inference import forward

NUM_REPEATS = 9


def measure_latency(
    models: Sequence[EvaluatedModel], lengths: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """Milliseconds of one forward pass of one document; medians of interleaved repeats.

    Args:
        models: with distinct names.
        lengths: in tokens; one that a model has no positions for is left out for it.

    Returns:
        By name, by length.
    """
    generator = np.random.default_rng(0)
    found: dict[str, dict[int, float]] = {one.name: {} for one in models}
    for length in lengths:
        timed = [one for one in models if length <= one.num_positions]
        durations: dict[str, list[float]] = {one.name: [] for one in timed}
        for repeat in range(NUM_REPEATS + 1):
            for one in timed:
                ids = generator.integers(0, one.model.config.vocab_size, (1, length))
                duration = _time_forward(one, torch.from_numpy(ids))
                if repeat > 0:  # the first pass allocates
                    durations[one.name].append(1000 * duration)
        for name, values in durations.items():
            found[name][length] = median(values)
    return found


def _time_forward(one: EvaluatedModel, input_ids: torch.Tensor) -> float:
    input_ids = input_ids.to(one.model.device)
    mask = torch.ones_like(input_ids)
    started = time.perf_counter()
    forward(one.model, input_ids, mask, one.autocast).cpu()  # waits for the device
    return time.perf_counter() - started
