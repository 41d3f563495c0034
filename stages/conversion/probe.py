"""What a conversion loses, measured on the first positions of the cache that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.conversion.codecs import LogitsOf, Recode, Sample, drawn_at
from teacher_cache.stages.teacher.probe import NUM_POSITIONS, probed_temperatures
from teacher_cache.stages.teacher.reconstruction import reconstruction_error
from teacher_cache.stages.tokens.support import Support

SIZES = ("topk_sizes", "sampled_sizes")
UNUSED_MASS = "unused_mass"


def probed_again(
    target: AnyCodec,
    convert: Recode,
    logits_of: LogitsOf | None,
    readers: Mapping[str, CacheReader],
) -> dict[str, Any]:
    """For the manifest: what the target's codec costs and loses beside the source's.

    The exact teacher is not there. Where the source keeps all logits, the target is compared with
    *them*, and `measured_against` says so; its own error against the teacher stays with
    `about.converted_from.probe`. Elsewhere nothing is measured, and only the size of the heads is
    counted.
    """
    positions = _first_positions(readers)
    if logits_of is None:
        sizes = [
            converted[name].astype(np.int64)[counts]
            for sample, counts in positions
            for converted in [convert(sample)]
            for name in SIZES
            if name in converted
        ]
        num_ids = float(np.concatenate(sizes).mean()) if sizes else None
        return {"reconstruction": [], "num_ids": num_ids, "measured_against": None}
    logits, draws = [], []
    for sample, counts in positions:
        where = np.flatnonzero(counts)
        logits.append(logits_of(sample)[torch.from_numpy(where).to(logits_of.device)])
        numbers = drawn_at(target, sample)
        draws.append(None if numbers is None else numbers[where])
    if not logits:
        return {"reconstruction": [], "measured_against": None}
    drawn = [one for one in draws if one is not None]
    errors = [
        reconstruction_error(
            target,
            Support(size=target.support_size),
            torch.cat(logits),
            temperature=temperature,
            drawn_at=np.concatenate(drawn) if drawn else None,
        ).to_json()
        for temperature in probed_temperatures(target)
    ]
    # Of rows that no token has, nothing is left in the source to measure.
    for error in errors:
        del error[UNUSED_MASS]
    return {"reconstruction": errors, "measured_against": logits_of.codec.name}


def _first_positions(readers: Mapping[str, CacheReader]) -> list[tuple[Sample, np.ndarray]]:
    """The first samples and, [S] bool, those of their positions that count, 128 in all."""
    found: list[tuple[Sample, np.ndarray]] = []
    left = NUM_POSITIONS
    for sample in islice(_samples(readers), NUM_POSITIONS):
        counts = sample["loss_mask"] & (np.cumsum(sample["loss_mask"]) <= left)
        if counts.any():
            found.append((sample, counts))
            left -= int(counts.sum())
        if not left:
            break
    return found


def _samples(readers: Mapping[str, CacheReader]) -> Iterator[Sample]:
    for reader in readers.values():
        for idx in range(len(reader)):
            yield reader.sample(idx)
