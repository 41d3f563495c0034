"""The tasks by their names: what a person is told of each, and where its part of a stage is.

Light to import: a stage's part is imported when it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from teacher_cache.cache.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from teacher_cache.stages.evaluation.task import EvaluationTask
    from teacher_cache.stages.teacher.task import Task
    from teacher_cache.stages.training.task import StudentTask


class KnownTask(ABC):
    """What a sample is.

    Attributes:
        name: on the command line, in manifests and in records.
        kind: of model, as a sentence names it.
        labeled: whether a document needs a label.
        predicts_tokens: whether the teacher speaks of token ids, which are aligned with others.
        reads_conversations: whether columns of messages are read.
        reads_pairs: whether a document may be two texts.
        takes_unlabeled: whether text without labels that comes with the data is taken unasked.
        of_fallback: options of `--data` that other data, listed in `--fallback`, is read without.
        of_fallback_preset: the same of a preset.
        has_codec: whether what the teacher says is kept by a codec, whose loss can be measured.
        needs_teacher: what is wrong with `--data NAME` that names no teacher.
        needs_data: of an evaluation.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    labeled: ClassVar[bool]
    predicts_tokens: ClassVar[bool]
    reads_conversations: ClassVar[bool]
    reads_pairs: ClassVar[bool]
    takes_unlabeled: ClassVar[bool]
    of_fallback: ClassVar[tuple[str, ...]]
    of_fallback_preset: ClassVar[tuple[str, ...]]
    has_codec: ClassVar[bool]
    needs_teacher: ClassVar[str]
    needs_data: ClassVar[str]

    @property
    @abstractmethod
    def teacher(self) -> type[Task[Any, Any]]:
        """Its part of stage one."""

    @property
    @abstractmethod
    def student(self) -> type[StudentTask]:
        """Its part of stage two."""

    @property
    @abstractmethod
    def evaluation(self) -> EvaluationTask[Any]:
        """Its part of the evaluation."""


class Classification(KnownTask):
    """A document is a sample, of one class."""

    name = "classification"
    kind = "a classifier"
    labeled = True
    predicts_tokens = False
    reads_conversations = False
    reads_pairs = True
    takes_unlabeled = True
    of_fallback = ()
    of_fallback_preset = ("split", "text_column", "label_column", "label_names")
    has_codec = False
    needs_teacher = (
        "is no preset, so it names no teacher: give --teacher, the folder or hub id of a "
        "fine-tuned classifier"
    )
    needs_data = (
        "evaluate needs --data: labelled documents that the student has not seen; or --cache, of "
        "which it reads what the run held out"
    )

    @property
    def teacher(self) -> type[Task[Any, Any]]:
        """Class logits of a document."""
        from teacher_cache.stages.teacher.classification import Classification

        return Classification

    @property
    def student(self) -> type[StudentTask]:
        """A label and a row of logits a sample."""
        from teacher_cache.stages.training.classification import ClassificationStudents

        return ClassificationStudents

    @property
    def evaluation(self) -> EvaluationTask[Any]:
        """On documents with labels."""
        from teacher_cache.stages.evaluation.classification import Classification

        return Classification()


class LanguageModeling(KnownTask):
    """Documents are packed into samples, and every next token is a label."""

    name = "lm"
    kind = "a language model"
    labeled = False
    predicts_tokens = True
    reads_conversations = True
    reads_pairs = False
    takes_unlabeled = False
    of_fallback = ("split",)
    of_fallback_preset = ("split",)
    has_codec = True
    needs_teacher = (
        "names no language model: give --teacher, the folder or hub id of a causal language model"
    )
    needs_data = (
        "evaluate needs --data, text that the student has not seen; or --cache, of which it reads "
        "what the run held out"
    )

    @property
    def teacher(self) -> type[Task[Any, Any]]:
        """A distribution at each position."""
        from teacher_cache.stages.teacher.language_modeling import LanguageModeling

        return LanguageModeling

    @property
    def student(self) -> type[StudentTask]:
        """A distribution at each position of packed text."""
        from teacher_cache.stages.training.language_modeling import LanguageModelStudents

        return LanguageModelStudents

    @property
    def evaluation(self) -> EvaluationTask[Any]:
        """On text, or on a cache."""
        from teacher_cache.stages.evaluation.language_modeling import LanguageModeling

        return LanguageModeling()


TASKS: dict[str, KnownTask] = {one.name: one for one in (Classification(), LanguageModeling())}
DEFAULT_TASK = Classification.name

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[*TASKS]  # so that the command line lists them


def task_named(name: str, where: object) -> KnownTask:
    """The task of that name.

    Args:
        name: as a manifest or a run records it.
        where: the folder that does, for the message.

    Raises:
        UserError: if this release has no such task.
    """
    if name not in TASKS:
        raise UserError(
            f"{where} is of the task {name!r}, which is unknown to this release: "
            f"{did_you_mean(name, TASKS)}"
        )
    return TASKS[name]
