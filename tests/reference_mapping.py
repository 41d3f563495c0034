"""Slow, obvious float64 versions of a teacher mapped to a student's ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mapped:
    """Of one position at one temperature: mass by student id, and mass that has none."""

    masses: np.ndarray
    unmatched: float


def mapped(
    logits: np.ndarray, student_ids: np.ndarray, num_rows: int, temperature: float
) -> Mapped:
    """Softmax at the temperature, then every teacher id's probability goes where the map says."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    masses, unmatched = np.zeros(num_rows), 0.0
    for student_id, probability in zip(student_ids.tolist(), weights / weights.sum(), strict=True):
        if student_id < 0:
            unmatched += probability
        else:
            masses[student_id] += probability
    return Mapped(masses, unmatched)


@dataclass(frozen=True)
class HeadAndTail:
    """What a top-k cache of a mapped position has to give back at one temperature."""

    ids: np.ndarray
    head: np.ndarray
    tail: float


def head_and_tail(
    logits: np.ndarray, student_ids: np.ndarray, num_rows: int, temperature: float, top_k: int
) -> HeadAndTail:
    """The K largest at T = 1 (ties to the lower id), and their masses at the temperature."""
    at_one = mapped(logits, student_ids, num_rows, 1.0).masses
    ids = np.lexsort((np.arange(num_rows), -at_one))[:top_k]
    found = mapped(logits, student_ids, num_rows, temperature)
    others = np.delete(found.masses, ids).sum()
    return HeadAndTail(ids, found.masses[ids], float(others + found.unmatched))
