"""What a classifier's outputs mean: one of several classes, any of several labels, or a number.

A *kind of head* is decided once, by the teacher's configuration and where that leaves it open by
how the labels are written; the cache's settings hold it (but for one of several classes, which all
caches held once), and a student's configuration as transformers' `problem_type`. All else asks the
kind: how labels are read and stored, how an answer is measured and said. What it costs to learn
stands in `stages/losses/objective.py`, for it needs torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import ABSENT_LABEL, CLASS_LABEL, NO_LABEL, FieldSpec
from teacher_cache.stages.data.label_kinds import (
    are_fractions,
    are_sets,
    read_label_sets,
    read_label_values,
)
from teacher_cache.stages.data.labels import AnyLabels, Label, read_labels

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

    from teacher_cache.stages.training.measures import Measure

HeadName = Literal["single_label_classification", "multi_label_classification", "regression"]
"""As transformers names what it calls a `problem_type`."""
THRESHOLD = 0.5
HEAD = "head"
"""Of a cache's settings: the kind of its teacher's head."""


class Head(ABC):
    """One of the kinds; it holds nothing.

    Attributes:
        name: as configurations and manifests have it.
        kind: of a teacher, as a sentence names it.
        idle_options: of the objective's, what means nothing here, and why.
        has_threshold: whether an answer is what is more probable than a threshold.
        baseline: what a table calls the answer that regards no document.
    """

    name: ClassVar[HeadName]
    kind: ClassVar[str]
    idle_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    has_threshold: ClassVar[bool] = False
    baseline: ClassVar[str] = "majority"

    @property
    def settings(self) -> dict[str, str]:
        """For a fingerprint; absent of the kind that all older caches are of."""
        return {HEAD: self.name}

    @property
    def problem_type(self) -> str | None:
        """Of a Mamba student's configuration; None as older ones have it."""
        return self.name

    # Labels.

    @abstractmethod
    def read_labels(
        self,
        table: pa.Table,
        features: Features,
        columns: Sequence[str],
        label_names: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> AnyLabels:
        """Read the label columns of a split whole.

        Raises:
            UserError: if they hold labels of another kind.
        """

    @abstractmethod
    def field(self, num_outputs: int) -> FieldSpec:
        """How the cache stores a sample's label."""

    @abstractmethod
    def stored(self, labels: Sequence[Label | None], num_outputs: int) -> np.ndarray:
        """Labels as that field holds them, [N, ...]."""

    @abstractmethod
    def has_label(self, stored: np.ndarray) -> np.ndarray:
        """[N] bool, of labels as stored."""

    def batched(self, stored: np.ndarray) -> np.ndarray:
        """[B, ...] labels as a loss takes them, what is absent marked as there."""
        return stored

    def check_learnable(self, labels: np.ndarray, cache: object) -> None:
        """Refuse labels, as stored, from which nothing can be told apart; most kinds need none.

        Raises:
            UserError: saying what to cache or give.
        """
        return

    # Answers.

    @property
    @abstractmethod
    def quality(self) -> Measure:
        """What tells the better of two evaluations on labelled samples."""

    @property
    @abstractmethod
    def closeness(self) -> Measure:
        """The same where there is the teacher alone."""

    @abstractmethod
    def metrics(
        self, logits: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD
    ) -> dict[str, float]:
        """How good answers are, on samples with labels [N, ...] as stored."""

    @abstractmethod
    def likeness(self, logits: np.ndarray, teacher_logits: np.ndarray) -> dict[str, float]:
        """How close a student came to its teacher."""

    @abstractmethod
    def confidences(self, logits: np.ndarray) -> np.ndarray | None:
        """[N], how sure answers of logits [N, C] float64 are; None where none is a probability."""

    @abstractmethod
    def baseline_logits(self, labels: np.ndarray) -> np.ndarray:
        """[N, C], the best answer to all that regards no document, of labels as stored."""

    @abstractmethod
    def answer(self, logits: np.ndarray, names: Mapping[int, str], threshold: float) -> list[str]:
        """Fields of a line that says what logits [C] mean."""

    @abstractmethod
    def told_label(self, stored: Any, names: Mapping[str, str]) -> str:
        """A label as stored, for people."""

    @abstractmethod
    def told_outputs(self, logits: np.ndarray, names: Mapping[str, str]) -> list[str]:
        """A line for each of logits [C] float64."""


class SingleLabel(Head):
    """One of several classes: a softmax."""

    name = "single_label_classification"
    kind = "a classifier that chooses one of several classes"

    @property
    def settings(self) -> dict[str, str]:
        """None: caches had no other kind."""
        return {}

    @property
    def problem_type(self) -> str | None:
        """None, as transformers takes it for where there are several outputs."""
        return None

    def read_labels(
        self,
        table: pa.Table,
        features: Features,
        columns: Sequence[str],
        label_names: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> AnyLabels:
        """Integers or names."""
        if len(columns) > 1:
            raise UserError(
                f"--label-column {','.join(columns)} names {len(columns)} columns (multi-label), "
                "and the teacher chooses one of several classes: name one column"
            )
        return read_labels(table, features, columns[0], label_names, label_map)

    def field(self, num_outputs: int) -> FieldSpec:
        """A class id, absent where there is none."""
        return CLASS_LABEL

    def stored(self, labels: Sequence[Label | None], num_outputs: int) -> np.ndarray:
        """[N] int32."""
        return np.array([ABSENT_LABEL if one is None else one for one in labels], np.int32)

    def has_label(self, stored: np.ndarray) -> np.ndarray:
        """Of a class."""
        return stored != ABSENT_LABEL

    def batched(self, stored: np.ndarray) -> np.ndarray:
        """[B] int64, `NO_LABEL` where there is none."""
        wide = stored.astype(np.int64)
        return np.where(wide == ABSENT_LABEL, NO_LABEL, wide)

    def check_learnable(self, labels: np.ndarray, cache: object) -> None:
        """Two classes."""
        classes = np.unique(labels)
        if len(classes) < 2:
            raise UserError(
                f"the {len(labels)} labelled samples of {cache} to train on are all of "
                f"class {classes.tolist()}: cache more of the data (--max-samples), or hold out "
                "less (--eval-fraction)"
            )

    @property
    def quality(self) -> Measure:
        """The accuracy."""
        from teacher_cache.stages.training.measures import ACCURACY

        return ACCURACY

    @property
    def closeness(self) -> Measure:
        """The agreement."""
        from teacher_cache.stages.training.measures import AGREEMENT

        return AGREEMENT

    def metrics(
        self, logits: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD
    ) -> dict[str, float]:
        """Accuracy, macro F1, calibration, likelihood."""
        from teacher_cache.stages.training.measures import classification_metrics

        return classification_metrics(logits, labels)

    def likeness(self, logits: np.ndarray, teacher_logits: np.ndarray) -> dict[str, float]:
        """Agreement and KL."""
        from teacher_cache.stages.training.measures import agreement_metrics

        return agreement_metrics(logits, teacher_logits)

    def confidences(self, logits: np.ndarray) -> np.ndarray:
        """Probability of the class."""
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return 1.0 / shifted.sum(axis=1)

    def baseline_logits(self, labels: np.ndarray) -> np.ndarray:
        """The most frequent class."""
        counts = np.bincount(labels)
        best = np.where(np.arange(len(counts)) == counts.argmax(), 1.0, 0.0)
        return np.tile(best, (len(labels), 1))

    def answer(self, logits: np.ndarray, names: Mapping[int, str], threshold: float) -> list[str]:
        """The class and its probability."""
        shares = softmax(logits)
        return [names[int(shares.argmax())], f"{shares.max():.3f}"]

    def told_label(self, stored: Any, names: Mapping[str, str]) -> str:
        """Its name."""
        return "none" if int(stored) == ABSENT_LABEL else names[str(int(stored))]

    def told_outputs(self, logits: np.ndarray, names: Mapping[str, str]) -> list[str]:
        """Logit and probability of each class."""
        return _told(logits, softmax(logits), names)


class MultiLabel(Head):
    """Any of several labels: a sigmoid each."""

    name = "multi_label_classification"
    kind = "a multi-label classifier, which gives each label a probability of its own"
    has_threshold = True

    def read_labels(
        self,
        table: pa.Table,
        features: Features,
        columns: Sequence[str],
        label_names: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> AnyLabels:
        """Lists, or a column of 0 and 1 a label."""
        return read_label_sets(table, features, columns, label_names)

    def field(self, num_outputs: int) -> FieldSpec:
        """0 or 1 a label; all `ABSENT_LABEL` where it is not known."""
        return FieldSpec(name="label", dtype="int8", shape=(num_outputs,))

    def stored(self, labels: Sequence[Label | None], num_outputs: int) -> np.ndarray:
        """[N, C] int8."""
        absent = (ABSENT_LABEL,) * num_outputs
        rows = [absent if one is None else one for one in labels]
        return np.array(rows, np.int8).reshape(len(rows), num_outputs)

    def has_label(self, stored: np.ndarray) -> np.ndarray:
        """Where it is known what labels a sample has."""
        return (stored != ABSENT_LABEL).all(axis=1)

    def batched(self, stored: np.ndarray) -> np.ndarray:
        """[B, C] int64, `NO_LABEL` where it is not known."""
        wide = stored.astype(np.int64)
        return np.where(wide == ABSENT_LABEL, NO_LABEL, wide)

    @property
    def quality(self) -> Measure:
        """The micro-averaged F1."""
        from teacher_cache.stages.training.measures import MICRO_F1

        return MICRO_F1

    @property
    def closeness(self) -> Measure:
        """The agreement."""
        from teacher_cache.stages.training.measures import AGREEMENT

        return AGREEMENT

    def metrics(
        self, logits: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD
    ) -> dict[str, float]:
        """Micro and macro F1, exact match."""
        from teacher_cache.stages.training.measures import multi_label_metrics

        return multi_label_metrics(logits, labels, threshold=threshold)

    def likeness(self, logits: np.ndarray, teacher_logits: np.ndarray) -> dict[str, float]:
        """Agreement and KL, means over labels."""
        from teacher_cache.stages.training.measures import multi_label_likeness

        return multi_label_likeness(logits, teacher_logits)

    def confidences(self, logits: np.ndarray) -> np.ndarray:
        """Mean probability of the answers to the labels."""
        return sigmoid(np.abs(logits)).mean(axis=1)

    def baseline_logits(self, labels: np.ndarray) -> np.ndarray:
        """Each label that more than half of the documents have."""
        return np.tile(np.where(labels.mean(axis=0) > 0.5, 1.0, -1.0), (len(labels), 1))

    def answer(self, logits: np.ndarray, names: Mapping[int, str], threshold: float) -> list[str]:
        """The labels above the threshold and their probabilities, the most probable first."""
        shares = sigmoid(logits)
        found = [i for i in np.argsort(-shares, kind="stable").tolist() if shares[i] > threshold]
        return [
            ",".join(names[i] for i in found),
            ",".join(f"{shares[i]:.3f}" for i in found),
        ]

    def told_label(self, stored: Any, names: Mapping[str, str]) -> str:
        """Their names."""
        if ABSENT_LABEL in stored:
            return "not known"
        return ", ".join(names[str(i)] for i in np.flatnonzero(stored)) or "no label"

    def told_outputs(self, logits: np.ndarray, names: Mapping[str, str]) -> list[str]:
        """Logit and probability of each label."""
        return _told(logits, sigmoid(logits), names)


class Regression(Head):
    """A number: the output itself."""

    name = "regression"
    kind = "a regression model, which gives a number"
    baseline = "mean"
    idle_options = MappingProxyType(
        {
            "temperature": "a number has none",
            "divergence": "numbers are compared by their squared difference",
            "conf_power": "a number has no probability",
            "label_smoothing": "a number is no class",
        }
    )

    def read_labels(
        self,
        table: pa.Table,
        features: Features,
        columns: Sequence[str],
        label_names: Sequence[str] | None,
        label_map: Sequence[str] | None,
    ) -> AnyLabels:
        """Numbers."""
        return read_label_values(table, features, columns)

    def field(self, num_outputs: int) -> FieldSpec:
        """A number, NaN where there is none."""
        return FieldSpec(name="label", dtype="float32")

    def stored(self, labels: Sequence[Label | None], num_outputs: int) -> np.ndarray:
        """[N] float32."""
        return np.array([np.nan if one is None else one for one in labels], np.float32)

    def has_label(self, stored: np.ndarray) -> np.ndarray:
        """A number."""
        return ~np.isnan(stored)

    @property
    def quality(self) -> Measure:
        """The mean squared error."""
        from teacher_cache.stages.training.measures import MSE

        return MSE

    @property
    def closeness(self) -> Measure:
        """The mean squared error from the teacher."""
        from teacher_cache.stages.training.measures import MSE_TO_TEACHER

        return MSE_TO_TEACHER

    def metrics(
        self, logits: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD
    ) -> dict[str, float]:
        """Squared error, and correlations where neither side is all one number."""
        from teacher_cache.stages.training.measures import regression_metrics

        found = regression_metrics(logits, labels)
        return {name: one for name, one in found.items() if name == "mse" or not np.isnan(one)}

    def likeness(self, logits: np.ndarray, teacher_logits: np.ndarray) -> dict[str, float]:
        """The same from the teacher's number."""
        from teacher_cache.stages.training.measures import regression_metrics

        found = regression_metrics(logits, teacher_logits[:, 0])
        correlation = found["pearson"]
        with_teacher = {} if np.isnan(correlation) else {"pearson_with_teacher": correlation}
        return {"mse_to_teacher": found["mse"], **with_teacher}

    def confidences(self, logits: np.ndarray) -> None:
        """A number has none."""

    def baseline_logits(self, labels: np.ndarray) -> np.ndarray:
        """The mean."""
        return np.full((len(labels), 1), labels.astype(np.float64).mean())

    def answer(self, logits: np.ndarray, names: Mapping[int, str], threshold: float) -> list[str]:
        """The number."""
        return [f"{logits[0]:.4g}"]

    def told_label(self, stored: Any, names: Mapping[str, str]) -> str:
        """The number."""
        return "none" if np.isnan(stored) else f"{float(stored):g}"

    def told_outputs(self, logits: np.ndarray, names: Mapping[str, str]) -> list[str]:
        """The number."""
        return [f"  {logits[0]:+.4f}"]


HEADS: dict[str, Head] = {one.name: one for one in (SingleLabel(), MultiLabel(), Regression())}
SINGLE = HEADS[SingleLabel.name]


def possible_heads(name: str, problem_type: str | None, num_outputs: int) -> tuple[HeadName, ...]:
    """Kinds of head that a model of this configuration may have.

    Where the configuration names none, a model of one output is of numbers, as transformers takes
    it; one of several may be of one class or of several labels, which the labels tell.

    Args:
        name: the model is called in a message.
        problem_type: of its configuration.
        num_outputs: of its head.

    Raises:
        UserError: if it is a kind that is not served.
    """
    if problem_type is None:
        one = num_outputs == 1
        return (Regression.name,) if one else (SingleLabel.name, MultiLabel.name)
    served = {
        SingleLabel.name: num_outputs > 1,
        MultiLabel.name: True,
        Regression.name: num_outputs == 1,
    }
    if not served.get(problem_type, False):
        numbers = "one number" if num_outputs == 1 else f"{num_outputs} numbers"
        raise UserError(
            f"{name} gives {numbers} a document and its problem_type is {problem_type}, which is "
            "not served: give a teacher that chooses one of several classes, a multi-label one, or "
            "one that gives one number"
        )
    return (HEADS[problem_type].name,)


def head_of_model(name: str, problem_type: str | None, num_outputs: int) -> Head:
    """The kind of a model's head, one of several classes where nothing else is said.

    Raises:
        UserError: as `possible_heads`.
    """
    return HEADS[possible_heads(name, problem_type, num_outputs)[0]]


def recorded_head(settings: Mapping[str, Any]) -> Head:
    """Of a cache, by its settings.

    Raises:
        UserError: if this release has no such kind.
    """
    name = settings.get(HEAD, SingleLabel.name)
    if name not in HEADS:
        raise UserError(f"the cache's head is of the kind {name!r}, unknown to this release")
    return HEADS[name]


def head_of_labels(heads: Sequence[str], table: pa.Table, columns: Sequence[str]) -> Head:
    """The kind of these that labels are written for; the first where they do not tell.

    Args:
        heads: that are possible.
        table: with the label columns.
        columns: of the labels.
    """
    if len(heads) > 1 and MultiLabel.name in heads and are_sets(table, columns):
        return HEADS[MultiLabel.name]
    if len(heads) > 1 and Regression.name in heads and are_fractions(table, columns):
        return HEADS[Regression.name]
    return HEADS[heads[0]]


def softmax(logits: np.ndarray) -> np.ndarray:
    """[C] probabilities in float64."""
    wide = logits.astype(np.float64)
    return np.exp(wide - np.logaddexp.reduce(wide))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def _told(logits: np.ndarray, shares: np.ndarray, names: Mapping[str, str]) -> list[str]:
    pairs = enumerate(zip(logits, shares, strict=True))
    return [
        f"  {names[str(i)]:>12}  logit {logit:+.4f}  p {share:.4f}" for i, (logit, share) in pairs
    ]
