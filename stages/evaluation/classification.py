"""Evaluating classifiers: a document has one position at which a teacher speaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import Corpus, Document, load_corpus
from teacher_cache.stages.data.labels import MISSING_LABEL, is_generic
from teacher_cache.stages.data.survey import survey
from teacher_cache.stages.evaluation.config import ClassifyingOptions, GenerationOptions
from teacher_cache.stages.evaluation.models import TEACHER, Classifier
from teacher_cache.stages.evaluation.task import NOTHING_MORE, EvaluateConfig, Say, Scored
from teacher_cache.stages.training.measures import agreement_metrics, classification_metrics

logger = logging.getLogger(__name__)

MAJORITY = "majority"
PREDICTION_TOKENS = 8192  # padded, in a forward batch


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row of the comparison; None where a column does not apply.

    Attributes:
        legend: what the figures mean, in a line.
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

    legend: ClassVar[str] = (
        "agrees: the teacher's class is chosen; KL: from the teacher's distribution, mean nats"
    )

    name: str
    accuracy: float | None = None
    f1: float | None = None
    ece: float | None = None
    nll: float | None = None
    agreement: float | None = None
    kl: float | None = None
    num_parameters: int | None = None
    megabytes: float | None = None
    latency_ms: dict[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class LabeledDocuments:
    """Documents with their classes, or without.

    Attributes:
        students: that read them.
        documents: that are not empty.
        labels: class id of each, int64 [N]; `MISSING_LABEL` where there is none.
        batch_tokens: padded tokens in a forward batch.
    """

    students: Sequence[Classifier]
    documents: list[Document]
    labels: np.ndarray
    batch_tokens: int

    def score(self, teacher: Classifier | None, say: Say) -> Scored:
        """A row for the most frequent class, the teacher and each student.

        Documents without a label say how often a student agrees with the teacher, and no more.

        Raises:
            UserError: if a model has other classes, its tokenizer leaves nothing of a document, or
                there are neither labels nor a teacher.
        """
        has_label = self.labels != MISSING_LABEL
        if teacher is None and not has_label.any():
            raise UserError(
                "the documents have no labels, so students can be compared with their teacher "
                "alone: leave --teacher none out, or give labelled documents"
            )
        rows = [_majority(self.labels[has_label])] if has_label.any() else []
        teacher_logits = None
        for classifier in [*([teacher] if teacher else []), *self.students]:
            say(f"classifying {len(self.labels):,} documents with {classifier.name}")
            _require_same_classes(classifier, self.students[0])
            samples = classifier.tokenize(self.documents)
            if len(samples) < len(self.documents):
                raise UserError(
                    f"the tokenizer of {classifier.name} leaves nothing of "
                    f"{len(self.documents) - len(samples)} documents that are not empty: take them "
                    "out"
                )
            logits = classifier.logits(samples, batch_tokens=self.batch_tokens)
            if classifier is teacher:
                teacher_logits = logits
            rows.append(_row(classifier.name, logits, self.labels, teacher_logits))
        return Scored(num_documents=len(self.labels), rows=rows)

    def written(self, models: Sequence[Classifier], say: Say) -> None:
        """Classifiers write nothing."""


class Classification:
    """Classifiers, on documents with labels."""

    row_names = (MAJORITY, TEACHER)
    student = teacher = Classifier

    def read(self, config: EvaluateConfig, students: Sequence[Classifier]) -> LabeledDocuments:
        """Read the documents, their labels by the names of the first student's classes.

        Raises:
            UserError: if all are empty.
        """
        assert config.corpus is not None, "asked before"
        corpus = load_corpus(config.corpus)
        _require_one_form(corpus, students)
        corpus = corpus.with_class_names(students[0].id2label)
        logger.info("held out: %s", survey(corpus).describe())
        documents = corpus.documents_with_text()
        return LabeledDocuments(
            students=students,
            documents=documents,
            labels=np.array(
                [MISSING_LABEL if one.label is None else one.label for one in documents], np.int64
            ),
            batch_tokens=config.batch_tokens,
        )

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
        """The class of each text, its probability and the text or both of a pair, tabs between.

        Raises:
            UserError: for an empty text, half a pair, or options of what writes.
        """
        if generation.flags:
            raise UserError(
                f"{', '.join(generation.flags)} is of language models, and {run} is a classifier: "
                "leave that out"
            )
        classifier = self.student.of_run(run, device)
        documents = _prompts(run, classifier.pair, texts, classifying, one_a_line=one_a_line)
        samples = classifier.tokenize(documents)
        if len(samples) < len(documents):
            raise UserError(
                f"{len(documents) - len(samples)} of {len(documents)} "
                f"{'pairs have an empty text' if classifier.pair else 'texts are empty'}: leave "
                "them out"
            )
        logits = classifier.logits(samples, batch_tokens=PREDICTION_TOKENS).astype(np.float64)
        probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        for one, row in zip(documents, probabilities, strict=True):
            answer = classifier.id2label[int(row.argmax())]
            yield "\t".join([answer, f"{row.max():.3f}", *one.texts])


def _prompts(
    run: Path,
    pair: tuple[str, ...] | None,
    texts: Sequence[str],
    classifying: ClassifyingOptions,
    *,
    one_a_line: bool,
) -> list[Document]:
    """The texts as documents, each a pair where the student reads pairs.

    Raises:
        UserError: for one text where there are to be two, or two where there is to be one.
    """
    second = classifying.second
    if pair is None and second is not None:
        raise UserError(f"--second is of pairs, and {run} reads single texts: leave it out")
    if pair is not None and second is None and not one_a_line:
        raise UserError(
            f"{run} reads pairs ({', '.join(pair)}), and here is one text: give the second with "
            "--second"
        )
    if second is not None and one_a_line:
        raise UserError("--second goes with one TEXT; of lines, each holds both, a tab between")
    documents = []
    for number, text in enumerate(texts, 1):
        sides = [text] if second is None else [text, second]
        if pair is not None and one_a_line:
            sides = text.split("\t")
            if len(sides) != 2:
                raise UserError(
                    f"line {number} has {len(sides) - 1} tabs, expected one between the two texts "
                    f"of a pair ({', '.join(pair)})"
                )
        documents.append(
            Document(
                text=sides[0],
                second=sides[1] if len(sides) > 1 else None,
                source="prompt",
                split="prompt",
                position=number - 1,
            )
        )
    return documents


def _require_one_form(corpus: Corpus, students: Sequence[Classifier]) -> None:
    """Refuse single texts for students of pairs, and pairs for others.

    Raises:
        UserError: naming the student.
    """
    source = corpus.config.source
    for one in students:
        if one.pair is not None and corpus.num_texts == 1:
            raise UserError(
                f"{one.name} reads pairs ({', '.join(one.pair)}), and {source} is read as single "
                f"texts: name both columns, as in --text-column {','.join(one.pair)}"
            )
        if one.pair is None and corpus.num_texts > 1:
            raise UserError(
                f"{one.name} reads single texts, and {source} is read as pairs: name one column "
                "with --text-column"
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
    name: str, logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None
) -> Evaluation:
    has_label = labels != MISSING_LABEL
    quality: dict[str, float] = {}
    if has_label.any():
        quality = classification_metrics(logits[has_label], labels[has_label])
    likeness = {} if teacher_logits is None else agreement_metrics(logits, teacher_logits)
    return Evaluation(
        name=name,
        accuracy=quality.get("accuracy"),
        f1=quality.get("f1"),
        ece=quality.get("ece"),
        nll=quality.get("nll"),
        agreement=likeness.get("agreement"),
        kl=likeness.get("kl"),
    )
