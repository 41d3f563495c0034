"""The teacher of a language model's student: what the cache holds, as its ids or through a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.stages.losses.linear_head import MAX_LOGITS
from teacher_cache.stages.losses.objective import TargetsByPosition
from teacher_cache.stages.training.targets import (
    CachedTargets,
    FixedMap,
    MappedTargets,
    ProjectedTargets,
)
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection, learned_share_at


@dataclass(frozen=True, kw_only=True)
class CachedTeacher:
    """The distributions as cached; a `TargetsOf`.

    Attributes:
        codec: of the cache; one of hidden states with its head, on the training's device.
        fixed: from the cached ids to the student's; None where they are the same.
    """

    codec: AnyCodec
    fixed: FixedMap | None = None

    def __call__(
        self,
        stored: Mapping[str, Tensor],
        *,
        temperature: float,
        num_outcomes: int,
        step: int | None,
    ) -> TargetsByPosition:
        """Through the fixed map, at every step alike."""
        fixed = self.fixed
        cached = CachedTargets(
            codec=self.codec,
            stored=stored,
            temperature=temperature,
            num_outcomes=num_outcomes if fixed is None else len(fixed.student_ids),
        )
        return cached if fixed is None else MappedTargets(cached=cached, fixed=fixed)

    @property
    def learned(self) -> Sequence[Tensor]:
        """None."""
        return ()

    @property
    def max_logits(self) -> int:
        """As many as ever."""
        return MAX_LOGITS


@dataclass(frozen=True, kw_only=True)
class ProjectedTeacher:
    """The distributions through a projection that learns beside the student; a `TargetsOf`.

    Attributes:
        fixed: through the fixed map, with which held-out distances are measured, so that they can
            be compared with those of `map`.
        projection: of the teacher's ids.
        between: the steps between which the fixed map passes into the learned projection.
    """

    fixed: CachedTeacher
    projection: LearnedProjection
    between: tuple[int, int]

    def __call__(
        self,
        stored: Mapping[str, Tensor],
        *,
        temperature: float,
        num_outcomes: int,
        step: int | None,
    ) -> TargetsByPosition:
        """Through the projection as it is at a step, or through the fixed map."""
        if step is None:
            return self.fixed(stored, temperature=temperature, num_outcomes=num_outcomes, step=None)
        start, end = self.between
        codec = self.fixed.codec
        return ProjectedTargets(
            cached=CachedTargets(
                codec=codec,
                stored=stored,
                temperature=temperature,
                num_outcomes=codec.support_size,
            ),
            projection=self.projection,
            learned_share=learned_share_at(step, start=start, end=end),
        )

    @property
    def learned(self) -> Sequence[Tensor]:
        """The projection's scores."""
        return (self.projection.scores,)

    @property
    def max_logits(self) -> int:
        """Fewer where a whole distribution, projected, takes several times the student's place."""
        is_sparse = isinstance(self.fixed.codec, TopKCodec)
        slots = self.projection.student_ids.shape[1] + 3
        return MAX_LOGITS if is_sparse else MAX_LOGITS // slots
