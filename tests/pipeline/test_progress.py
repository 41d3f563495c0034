"""What the progress bar shows."""

from __future__ import annotations

from dataclasses import fields

from teacher_cache.pipeline.progress import TERMS
from teacher_cache.stages.losses.objective import ObjectiveTerms


def test_every_term_of_the_objective_is_shown() -> None:
    terms = {field.name for field in fields(ObjectiveTerms)}
    beside = {"lm", "pooled", "attention", "hidden", "chunks", "chunks_unlabeled"}
    assert set(TERMS) == terms | beside | {"kd_unlabeled"}
