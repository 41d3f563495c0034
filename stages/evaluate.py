"""After stage two: students and their teacher side by side on documents that neither has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import CorpusConfig, load_corpus
from teacher_cache.stages.data.labels import is_generic
from teacher_cache.stages.evaluation.config import EvaluateOptions
from teacher_cache.stages.evaluation.latency import measure_latency
from teacher_cache.stages.evaluation.models import (
    TEACHER,
    Classifier,
    load_student,
    load_teacher_classifier,
)
from teacher_cache.stages.evaluation.packed_text import documents_with_text
from teacher_cache.stages.evaluation.runs import (
    require_distinct_names,
    teacher_beside,
    tokenization_marks,
)
from teacher_cache.stages.training.measures import agreement_metrics, classification_metrics

MAJORITY = "majority"


class EvaluateConfig(EvaluateOptions):
    """Everything the evaluation needs, resolved: no preset."""

    runs: tuple[Path, ...] = Field(min_length=1, description="Folders of trained students.")
    corpus: CorpusConfig = Field(description="Labelled documents to evaluate on.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row of the comparison; None where a column does not apply.

    Attributes:
        name: `majority`, `teacher`, or the run's folder name.
        accuracy: share of documents.
        f1: macro average.
        ece: expected calibration error.
        nll: mean negative log-likelihood of the labels, nats.
        agreement: share of documents on which it chooses the teacher's class.
        kl: mean KL from the teacher's distribution, nats.
        num_parameters: embeddings included.
        megabytes: of the parameters, 10**6 bytes.
        latency_ms: milliseconds of one forward pass of one document, by length in tokens.
    """

    name: str
    accuracy: float
    f1: float
    ece: float | None = None
    nll: float | None = None
    agreement: float | None = None
    kl: float | None = None
    num_parameters: int | None = None
    megabytes: float | None = None
    latency_ms: dict[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The table.

    Attributes:
        num_documents: that were not empty.
        rows: majority, teacher (unless there is none), then the runs as given.
        marks: by row, what a reader must know: a join that was let pass, say.
    """

    num_documents: int
    rows: tuple[Evaluation, ...]
    marks: dict[str, str]


def run(config: EvaluateConfig, on_step: Callable[[str], None] | None = None) -> EvaluateResult:
    """Evaluate students, and their teacher where it can be had.

    Args:
        config: runs and documents.
        on_step: told what is being done.

    Raises:
        UserError: for anything the user can mend: runs, documents, teacher.
    """
    say = on_step or (lambda _: None)
    require_distinct_names(config.runs, [MAJORITY, TEACHER])
    students = [load_student(folder, config) for folder in config.runs]
    asked = teacher_beside(config.runs, config)
    teacher = None if asked is None else load_teacher_classifier(asked)
    classifiers = [*([teacher] if teacher else []), *students]
    corpus = load_corpus(config.corpus).with_class_names(students[0].id2label)
    documents = documents_with_text(corpus)
    labels = np.array([document.label for document in documents], np.int64)
    teacher_logits = None
    rows = [_majority(labels)]
    for classifier in classifiers:
        say(f"classifying {len(labels):,} documents with {classifier.name}")
        _require_same_classes(classifier, students[0])
        samples = classifier.tokenize(documents)
        if len(samples) < len(documents):
            raise UserError(
                f"the tokenizer of {classifier.name} leaves nothing of "
                f"{len(documents) - len(samples)} documents that are not empty: take them out"
            )
        logits = classifier.logits(samples, batch_tokens=config.batch_tokens)
        if classifier is teacher:
            teacher_logits = logits
        rows.append(_row(classifier, logits, labels, teacher_logits))
    say("timing one document at a time")
    latency = measure_latency(classifiers, config.latency_lengths)
    timed = [replace(row, latency_ms=latency.get(row.name)) for row in rows]
    return EvaluateResult(
        num_documents=len(labels), rows=tuple(timed), marks=tokenization_marks(config.runs)
    )


def _require_same_classes(classifier: Classifier, student: Classifier) -> None:
    """Names must be equal; a teacher that only has placeholders (`LABEL_0`) must have as many."""
    comparable = classifier.id2label == student.id2label or (
        is_generic(classifier.id2label) and classifier.id2label.keys() == student.id2label.keys()
    )
    if not comparable:
        raise UserError(
            f"{classifier.name} has the classes {list(classifier.id2label.values())}, "
            f"{student.name} has {list(student.id2label.values())}: compare models of one task"
        )


def _majority(labels: np.ndarray) -> Evaluation:
    """Always the class that is the most frequent in these very documents."""
    counts = np.bincount(labels)
    logits = np.tile(
        np.where(np.arange(len(counts)) == counts.argmax(), 1.0, 0.0), (len(labels), 1)
    )
    metrics = classification_metrics(logits, labels)
    return Evaluation(name=MAJORITY, accuracy=metrics["accuracy"], f1=metrics["f1"])


def _row(
    classifier: Classifier,
    logits: np.ndarray,
    labels: np.ndarray,
    teacher_logits: np.ndarray | None,
) -> Evaluation:
    quality = classification_metrics(logits, labels)
    likeness = {} if teacher_logits is None else agreement_metrics(logits, teacher_logits)
    return Evaluation(
        name=classifier.name,
        accuracy=quality["accuracy"],
        f1=quality["f1"],
        ece=quality["ece"],
        nll=quality["nll"],
        agreement=likeness.get("agreement"),
        kl=likeness.get("kl"),
        num_parameters=classifier.num_parameters,
        megabytes=classifier.megabytes,
    )
