"""Lessons as the tasks of stage two compose them, for tests that train a few steps by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.training.auxiliaries import PooledProjection, WithAuxiliaries
from teacher_cache.stages.training.held_out import HeldOutTokens
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.targets import CachedTeacher, FixedMap, ProjectedTeacher
from teacher_cache.stages.training.terms import Chunks, NextTokens, PooledStates, Term
from teacher_cache.stages.training.views import SamplesView, TargetsOf, TokensView
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection


def samples_lesson(objective: ObjectiveConfig, *others: Term) -> Lesson:
    """Of a classifier's cache; `others` behind what the objective's own weights ask for."""
    terms: list[Term] = []
    if objective.lm_weight:
        terms.append(NextTokens(weight=objective.lm_weight))
    if objective.pooled_weight:
        terms.append(PooledStates(weight=objective.pooled_weight))
    return Lesson(view=SamplesView(), objective=objective, terms=[*terms, *others])


def tokens_lesson(
    codec: Codec,
    objective: ObjectiveConfig,
    *,
    support: Tensor,
    fixed_map: FixedMap | None = None,
    projection: LearnedProjection | None = None,
    between: tuple[int, int] = (0, 0),
    has_chunks: bool = False,
) -> Lesson:
    """Of a language model's cache."""
    fixed = CachedTeacher(codec=codec, fixed=fixed_map)
    teacher: TargetsOf = fixed
    if projection is not None:
        teacher = ProjectedTeacher(fixed=fixed, projection=projection, between=between)
    return Lesson(
        view=TokensView(codec, teacher, support),
        objective=objective,
        terms=[Chunks(objective=objective)] if has_chunks else [],
    )


def held_out_tokens(lesson: Lesson, **arguments: Any) -> HeldOutTokens:
    """What measures held-out samples of such a lesson."""
    chunks = next((one for one in lesson.terms if isinstance(one, Chunks)), None)
    return HeldOutTokens(lesson.objective, chunks=chunks, **arguments)


def with_pooled_projection(
    student: torch.nn.Module, *, teacher_width: int, seed: int, **others: Any
) -> WithAuxiliaries:
    """A classifier's student whose pooled state is matched; `others` learn beside it, too."""
    config: Any = student.config
    pooled = PooledProjection(config.d_model, teacher_width=teacher_width, seed=seed)
    return WithAuxiliaries(student, pooled, *others.values())
