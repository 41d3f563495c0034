"""What an evaluation asks of a task, which alone knows how many positions a sample has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field

from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.evaluation.config import (
    AnswerOptions,
    ClassifyingOptions,
    EvaluateOptions,
    GenerationOptions,
)
from teacher_cache.stages.evaluation.details import Details
from teacher_cache.stages.evaluation.models import EvaluatedModel

NOTHING_MORE = ClassifyingOptions()

Say = Callable[[str], None]
ModelT = TypeVar("ModelT", bound=EvaluatedModel)
SetT = TypeVar("SetT", bound=EvaluatedModel, contravariant=True)


class EvaluateConfig(EvaluateOptions, AnswerOptions):
    """Everything the evaluation needs, resolved: no preset."""

    runs: tuple[Path, ...] = Field(min_length=1, description="Folders of trained students.")
    corpus: CorpusConfig | None = Field(
        default=None, description="Documents to evaluate on, labelled for classifiers."
    )
    cache: Path | None = Field(
        default=None, description="In the corpus's place: cache to evaluate on."
    )


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How well models predict, without what they cost.

    Attributes:
        num_documents: that were not empty; of a cache, whole ones and pieces.
        rows: of the table, in its order; each of the task's own kind.
        marks: by row, what a reader must know of it.
        details: what lies beyond the rows' means; None of a task that gives none.
    """

    num_documents: int
    rows: Sequence[Any]
    marks: Mapping[str, str] = field(default_factory=dict)
    details: Details | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """What models write.

    Attributes:
        prompt: with which they went on.
        by_name: each model's continuation; None where it cannot go on.
    """

    prompt: str
    by_name: Mapping[str, str | None]


class EvaluationSet(Protocol[SetT]):
    """Documents as the students read them, ready to be scored."""

    def score(self, teacher: SetT | None, say: Say) -> Scored:
        """Score the students, and the teacher beside them.

        Args:
            teacher: on its device; None where none is wanted, or a cache has what it said.
            say: told what is being done.

        Raises:
            UserError: if models and documents do not fit.
        """
        ...

    def written(self, models: Sequence[SetT], say: Say) -> Written | None:
        """What the models write behind the documents' beginning; None where none writes."""
        ...


class EvaluationTask(Protocol[ModelT]):
    """A kind of model, and how its figures come about."""

    @property
    def row_names(self) -> Sequence[str]:
        """Rows of the table that are no run's, whose names no run may have."""
        ...

    @property
    def student(self) -> type[ModelT]:
        """What loads a run's student."""
        ...

    @property
    def teacher(self) -> type[ModelT]:
        """What loads a teacher as a model among others."""
        ...

    def read(self, config: EvaluateConfig, students: Sequence[ModelT]) -> EvaluationSet[ModelT]:
        """Read the documents, or the cache.

        Raises:
            UserError: for anything the user can mend of them.
            CheckFailed: if the cache's head is damaged or missing.
        """
        ...

    def predict(
        self,
        run: Path,
        texts: Sequence[str],
        *,
        device: DeviceConfig,
        generation: GenerationOptions,
        classifying: ClassifyingOptions = NOTHING_MORE,
        one_a_line: bool,
    ) -> Iterator[str]:
        """What a student says of each text, as it is printed.

        Args:
            run: of the student.
            texts: that it reads.
            device: where it runs.
            generation: how it writes, if it does.
            classifying: what it reads besides, and how it answers, if it classifies.
            one_a_line: whether each text has a line of its own, and its answer must have one too.

        Raises:
            UserError: for an empty text, or options that mean nothing.
        """
        ...
