"""Evaluating classifiers: a document has one position at which a teacher speaks.

The teacher's part comes from running it over the documents, or from a cache, which needs none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import TEACHER_FOLDER
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import TOKEN_TYPES
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import Corpus, Document, load_corpus
from teacher_cache.stages.data.labels import MISSING_LABEL, is_generic
from teacher_cache.stages.data.survey import survey
from teacher_cache.stages.data.tokenization import Sample
from teacher_cache.stages.evaluation.config import ClassifyingOptions, GenerationOptions
from teacher_cache.stages.evaluation.details import (
    CONFIDENCE_EDGES,
    Bin,
    Details,
    Disagreement,
    Judged,
    ModelDetails,
    binned,
    bins_of,
    first_outcomes,
    intervals_of,
    largest_of_documents,
)
from teacher_cache.stages.evaluation.models import TEACHER, Classifier
from teacher_cache.stages.evaluation.runs import held_out_of
from teacher_cache.stages.evaluation.task import NOTHING_MORE, EvaluateConfig, Say, Scored
from teacher_cache.stages.heads import (
    HEADS,
    SINGLE,
    THRESHOLD,
    Head,
    MultiLabel,
    Regression,
    SingleLabel,
    recorded_head,
)
from teacher_cache.stages.models.pretrained import reads_token_types
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.training.measures import (
    agreement_metrics,
    classification_metrics,
    kl_of_each,
    log_softmax,
)

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
class MultiLabelEvaluation:
    """One row of the comparison of multi-label classifiers; None where a column does not apply.

    Attributes:
        legend: what the figures mean, in a line.
        name: `majority` (labels that more than half have), `teacher`, or the run's folder name.
        micro_f1: of all labels of all documents.
        macro_f1: mean over labels.
        exact_match: share of documents whose labels are all right.
        agreement: share of labels of which it says what the teacher says.
        kl: mean KL from the teacher's two outcomes of a label, nats.
        num_parameters: embeddings included.
        megabytes: of the parameters, 10**6 bytes.
        latency_ms: as in `Evaluation`.
    """

    legend: ClassVar[str] = (
        "agrees: labels of which it says what the teacher says; KL: from the teacher's answer to a "
        "label, mean nats"
    )

    name: str
    micro_f1: float | None = None
    macro_f1: float | None = None
    exact_match: float | None = None
    agreement: float | None = None
    kl: float | None = None
    num_parameters: int | None = None
    megabytes: float | None = None
    latency_ms: dict[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class RegressionEvaluation:
    """One row of the comparison of models of a number; None where a column does not apply.

    Attributes:
        legend: what the figures mean, in a line.
        name: `mean`, `teacher`, or the run's folder name.
        mse: mean squared error.
        pearson: correlation with the labels; None of equal numbers, as the next.
        spearman: of the ranks.
        mse_to_teacher: mean squared difference from the teacher's number.
        pearson_with_teacher: correlation with it.
        num_parameters: embeddings included.
        megabytes: of the parameters, 10**6 bytes.
        latency_ms: as in `Evaluation`.
    """

    legend: ClassVar[str] = (
        "MSE, Pearson and Spearman against the labels; to teacher: against the teacher's number"
    )

    name: str
    mse: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    mse_to_teacher: float | None = None
    pearson_with_teacher: float | None = None
    num_parameters: int | None = None
    megabytes: float | None = None
    latency_ms: dict[int, float] | None = None


ROWS: Mapping[str, Any] = MappingProxyType(
    {
        SingleLabel.name: Evaluation,
        MultiLabel.name: MultiLabelEvaluation,
        Regression.name: RegressionEvaluation,
    }
)
"""By the kind of head, a row of the comparison."""


@dataclass(frozen=True, kw_only=True)
class LabeledDocuments:
    """Documents with their classes, or without.

    Attributes:
        students: that read them.
        documents: that are not empty.
        labels: of each, as the head stores them, [N, ...].
        head: what the students' outputs mean.
        threshold: of multi-label classifiers.
        batch_tokens: padded tokens in a forward batch.
    """

    students: Sequence[Classifier]
    documents: list[Document]
    labels: np.ndarray
    head: Head
    threshold: float
    batch_tokens: int

    def score(self, teacher: Classifier | None, say: Say) -> Scored:
        """A row for the most frequent class, the teacher and each student.

        Documents without a label say how often a student agrees with the teacher, and no more.

        Raises:
            UserError: if a model has other classes, its tokenizer leaves nothing of a document, or
                there are neither labels nor a teacher.
        """
        if teacher is None and not self.head.has_label(self.labels).any():
            raise UserError(
                "the documents have no labels, so students can be compared with their teacher "
                "alone: leave --teacher none out, or give labelled documents"
            )
        logits: dict[str, np.ndarray] = {}
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
            logits[classifier.name] = classifier.logits(samples, batch_tokens=self.batch_tokens)
            lengths = np.array([len(one.input_ids) for one in samples])
        return _scored(
            logits,
            self.labels,
            lengths,  # of the last model; they differ by its tokenizer alone
            text_of=lambda i: "\n".join(self.documents[i].texts),
            id2label=self.students[0].id2label,
            head=self.head,
            threshold=self.threshold,
        )

    def written(self, models: Sequence[Classifier], say: Say) -> None:
        """Classifiers write nothing."""


@dataclass(frozen=True, kw_only=True)
class CachedDocuments:
    """A cache's labelled split, or where a run was trained on it what the runs held out.

    Attributes:
        students: that read its tokens.
        reader: of it.
        chosen: which samples.
        threshold: of multi-label classifiers.
        batch_tokens: padded tokens in a forward batch.
    """

    students: Sequence[Classifier]
    reader: CacheReader
    chosen: np.ndarray
    threshold: float
    batch_tokens: int

    def score(self, teacher: Classifier | None, say: Say) -> Scored:
        """A row for the most frequent class, for what the cache has of the teacher, each student.

        Raises:
            UserError: if a student has other classes than the cache.
        """
        about = self.reader.manifest.about
        names = {int(one): name for one, name in about["id2label"].items()}
        head = recorded_head(self.reader.manifest.settings)
        for student in self.students:
            if student.head is not head:
                raise UserError(
                    f"{student.name} is {student.head.kind}, and the teacher of the cache "
                    f"{self.reader.cache} is {head.kind}: give text with --data"
                )
            if student.id2label != names:
                raise UserError(
                    f"{student.name} has the classes {list(student.id2label.values())}, the cache "
                    f"{self.reader.cache} has {list(names.values())}: give text with --data"
                )
        found = [self.reader.sample(int(i)) for i in self.chosen]
        labels = np.stack([one["label"] for one in found])
        logits = {TEACHER: np.stack([one["class_logits"] for one in found])}
        for student in self.students:
            say(f"classifying {len(found):,} cached documents with {student.name}")
            has_types = student.pair is not None and reads_token_types(
                student.model, student.tokenizer
            )
            samples = [
                Sample(
                    sample_id=b"",
                    input_ids=one["input_ids"],
                    label=None,
                    was_truncated=False,
                    token_types=one.get(TOKEN_TYPES) if has_types else None,
                )
                for one in found
            ]
            logits[student.name] = student.logits(samples, batch_tokens=self.batch_tokens)
        first = self.students[0]

        def text_of(i: int) -> str:
            # Only its special tokens show where the second text of a pair begins.
            ids = found[i]["input_ids"].tolist()
            return str(first.tokenizer.decode(ids, skip_special_tokens=first.pair is None))

        lengths = np.array([len(one["input_ids"]) for one in found])
        return _scored(
            logits,
            labels,
            lengths,
            text_of=text_of,
            id2label=names,
            head=head,
            threshold=self.threshold,
        )

    def written(self, models: Sequence[Classifier], say: Say) -> None:
        """Classifiers write nothing."""


class Classification:
    """Classifiers, on documents with labels or on a cache."""

    row_names = (*dict.fromkeys(one.baseline for one in HEADS.values()), TEACHER)
    student = teacher = Classifier

    def read(
        self, config: EvaluateConfig, students: Sequence[Classifier]
    ) -> LabeledDocuments | CachedDocuments:
        """Read the documents, their labels by the names of the first student's classes; or a cache.

        Raises:
            UserError: if all are empty, or the cache does not fit the students.
        """
        head = students[0].head
        threshold = _threshold(config.threshold, head)
        if config.cache is not None:
            return _read_cache(config, config.cache, students, threshold)
        assert config.corpus is not None, "asked before"
        corpus = load_corpus(config.corpus.model_copy(update={"heads": (head.name,)}))
        _require_one_form(corpus, students)
        corpus = corpus.with_class_names(students[0].id2label)
        logger.info("held out: %s", survey(corpus).describe())
        documents = corpus.documents_with_text()
        return LabeledDocuments(
            students=students,
            documents=documents,
            labels=head.stored([one.label for one in documents], len(students[0].id2label)),
            head=head,
            threshold=threshold,
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
        """The answer to each text and the text or both of a pair, tabs between.

        Of one of several classes the class and its probability; of several labels those above the
        threshold, with commas between, and their probabilities; or the number.

        Raises:
            UserError: for an empty text, half a pair, or options of what writes.
        """
        if generation.flags:
            raise UserError(
                f"{', '.join(generation.flags)} is of language models, and {run} is a classifier: "
                "leave that out"
            )
        classifier = self.student.of_run(run, device)
        threshold = _threshold(classifying.threshold, classifier.head)
        documents = _prompts(run, classifier.pair, texts, classifying, one_a_line=one_a_line)
        samples = classifier.tokenize(documents)
        if len(samples) < len(documents):
            raise UserError(
                f"{len(documents) - len(samples)} of {len(documents)} "
                f"{'pairs have an empty text' if classifier.pair else 'texts are empty'}: leave "
                "them out"
            )
        logits = classifier.logits(samples, batch_tokens=PREDICTION_TOKENS).astype(np.float64)
        for one, row in zip(documents, logits, strict=True):
            answer = classifier.head.answer(row, classifier.id2label, threshold)
            yield "\t".join([*answer, *one.texts])


def _threshold(asked: float | None, head: Head) -> float:
    """Above which a label is given.

    Raises:
        UserError: if it was asked for and there are no such labels.
    """
    if asked is not None and not head.has_threshold:
        raise UserError(
            f"--threshold is of multi-label classifiers, and this is {head.kind}: leave it out"
        )
    return THRESHOLD if asked is None else asked


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """None in the place of what cannot be told: a correlation of equal numbers."""
    return {name: one if np.isfinite(one) else None for name, one in figures.items()}


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


def _read_cache(
    config: EvaluateConfig, cache: Path, students: Sequence[Classifier], threshold: float
) -> CachedDocuments:
    if config.teacher not in (None, "none"):
        raise UserError(
            f"--teacher {config.teacher} is run over text, and --cache has what the teacher said: "
            "leave one of them out"
        )
    reader = CacheReader(cache)
    task = reader.manifest.settings["task"]
    if task != students[0].task:
        raise UserError(
            f"--cache {cache} is of the task {task!r}, and {students[0].name} of "
            f"{students[0].task!r}: give text with --data"
        )
    held_out = held_out_of(config.runs, reader)
    cached = load_tokenizer(str((cache / TEACHER_FOLDER).resolve()), option="--cache")
    for one in students:
        if one.tokenizer.get_vocab() != cached.get_vocab():
            raise UserError(
                f"{one.name} reads other tokens than {cache} holds: give text with --data"
            )
    chosen = np.arange(len(reader)) if held_out is None else np.flatnonzero(held_out)
    return CachedDocuments(
        students=students,
        reader=reader,
        chosen=chosen,
        threshold=threshold,
        batch_tokens=config.batch_tokens,
    )


def _require_same_classes(classifier: Classifier, student: Classifier) -> None:
    """Names must be equal; a teacher that only has placeholders (`LABEL_0`) must have as many.

    So must kinds of heads, or a teacher's be open.
    """
    if student.head.name not in classifier.heads:
        raise UserError(
            f"{classifier.name} is {classifier.head.kind}, and {student.name} is "
            f"{student.head.kind}: compare models of one kind"
        )
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


def _scored(
    logits: dict[str, np.ndarray],
    labels: np.ndarray,
    lengths: np.ndarray,
    *,
    text_of: Callable[[int], str],
    id2label: dict[int, str],
    head: Head,
    threshold: float,
) -> Scored:
    """Rows and, of one of several classes, details.

    Args:
        logits: by name [N, C], the teacher's first if there is one.
        labels: [N, ...] as the head stores them; a class is `MISSING_LABEL` where there is none.
        lengths: [N] tokens.
        text_of: a document's text.
        id2label: names of the classes.
        head: what the logits mean.
        threshold: of multi-label classifiers.
    """
    if head is not SINGLE:
        return _scored_by_head(head, logits, labels, threshold)
    labels = labels.astype(np.int64)
    has_label = labels != MISSING_LABEL
    of_teacher = logits.get(TEACHER)
    rows = [_majority(labels[has_label])] if has_label.any() else []
    rows += [_row(name, one, labels, of_teacher) for name, one in logits.items()]
    judged = {name: _judged(one, labels, lengths, of_teacher) for name, one in logits.items()}
    intervals, differences = intervals_of(judged)
    names = [id2label[i] for i in range(len(id2label))]
    details = {
        name: ModelDetails(
            intervals=intervals[name],
            **bins_of(judged[name]),
            **_against_labels(one[has_label], labels[has_label]),
        )
        for name, one in logits.items()
    }
    for name, one in logits.items() if of_teacher is not None else ():
        if name != TEACHER:
            found = _disagreements(one, of_teacher, labels, text_of, names)
            details[name] = replace(details[name], disagreements=found)
    return Scored(
        num_documents=len(labels),
        rows=rows,
        details=Details(models=details, differences=differences, class_names=names),
    )


def _scored_by_head(
    head: Head, logits: dict[str, np.ndarray], labels: np.ndarray, threshold: float
) -> Scored:
    """Rows of the head's measures."""
    row_of, has_label, of_teacher = ROWS[head.name], head.has_label(labels), logits.get(TEACHER)
    known, rows = labels[has_label], []
    if len(known):
        figures = head.metrics(head.baseline_logits(known), known, threshold)
        rows.append(row_of(name=head.baseline, **_finite(figures)))
    for name, one in logits.items():
        figures = head.metrics(one[has_label], known, threshold) if len(known) else {}
        figures |= {} if of_teacher is None else head.likeness(one, of_teacher)
        rows.append(row_of(name=name, **_finite(figures)))
    return Scored(num_documents=len(labels), rows=rows)


def _judged(
    logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray, teacher: np.ndarray | None
) -> Judged:
    num, has_label = len(labels), labels != MISSING_LABEL
    log_probs = log_softmax(logits)
    chosen = log_probs.argmax(axis=1)
    of_label = log_probs[np.arange(num), np.where(has_label, labels, 0)]
    figures = {
        "accuracy": np.where(has_label, chosen == labels, np.nan),
        "nll": np.where(has_label, -of_label, np.nan),
    }
    if teacher is not None:
        figures["agreement"] = (chosen == teacher.argmax(axis=1)).astype(float)
        figures["kl"] = kl_of_each(logits, teacher)
    return Judged(
        document=np.arange(num),
        length=lengths,
        confidence=None if teacher is None else np.exp(log_softmax(teacher).max(axis=1)),
        figures=figures,
    )


def _against_labels(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Counts by label and class, and how right a model is by how sure it is."""
    if not len(labels):
        return {}
    log_probs = log_softmax(logits)
    confusion = np.zeros((logits.shape[1],) * 2, np.int64)
    np.add.at(confusion, (labels, log_probs.argmax(axis=1)), 1)
    confidence = np.exp(log_probs.max(axis=1))
    figures = {
        "confidence": confidence,
        "accuracy": (log_probs.argmax(axis=1) == labels).astype(float),
    }
    bins: list[Bin] = binned(confidence, CONFIDENCE_EDGES, figures)
    return {"confusion": confusion.tolist(), "calibration": bins}


def _disagreements(
    logits: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    text_of: Callable[[int], str],
    names: Sequence[str],
) -> list[Disagreement]:
    kl = kl_of_each(logits, teacher)
    ours, theirs = np.exp(log_softmax(logits)), np.exp(log_softmax(teacher))
    return [
        Disagreement(
            text=text_of(int(i)),
            truth=None if labels[i] == MISSING_LABEL else names[labels[i]],
            kl=float(kl[i]),
            teacher=first_outcomes(theirs[i], names),
            student=first_outcomes(ours[i], names),
        )
        for i in largest_of_documents(kl, np.arange(len(kl)))
    ]


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
