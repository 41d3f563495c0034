"""What the progress bar shows."""

from __future__ import annotations

from dataclasses import fields

from teacher_cache.pipeline.progress import TERMS
from teacher_cache.stages.losses.language_model import LanguageModelTerms
from teacher_cache.stages.losses.objective import ObjectiveTerms


def test_every_term_of_the_objectives_is_shown() -> None:
    terms = {field.name for kind in (ObjectiveTerms, LanguageModelTerms) for field in fields(kind)}
    matched = {"attention", "hidden", "chunks", "chunks_unlabeled"}
    assert set(TERMS) == terms | matched | {"kd_unlabeled"}
