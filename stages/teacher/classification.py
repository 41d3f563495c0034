"""The classification task: a document is a sample, and its class logits are kept."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache.confusion import ON_LABELS, Confusion
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import (
    POOLED,
    SAMPLE_ID_BYTES,
    TOKEN_TYPES,
    Fields,
    Ragged,
    Schema,
    classification_schema,
    width_of_pooled,
)
from teacher_cache.stages.data.corpus import Corpus, Document
from teacher_cache.stages.data.tokenization import Sample, tokenize
from teacher_cache.stages.heads import HEADS, SINGLE, Head, HeadName
from teacher_cache.stages.models.batching import ALONE
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.models.pretrained import reads_token_types
from teacher_cache.stages.teacher.config import CaptureConfig, TeacherConfig
from teacher_cache.stages.teacher.forward import find_pooled_width, run_teacher
from teacher_cache.stages.teacher.layers import (
    STATE_TOLERANCE,
    LayerPlan,
    LayerTap,
    half,
    states_apart,
)
from teacher_cache.stages.teacher.load import (
    ClassificationTeacher,
    identity,
    labels_read_by,
    load_teacher,
)
from teacher_cache.stages.teacher.options import hidden_options
from teacher_cache.stages.teacher.tables import (
    STATES,
    STATES_FILE,
    TABLE,
    TABLE_FILE,
    token_states,
)
from teacher_cache.stages.teacher.task import Said, StoredSample, TapOf, Task
from teacher_cache.stages.tokens.record import describe, pair_form

logger = logging.getLogger(__name__)

NUM_NAMED = 5  # classes in a message
# Batches of other shapes round otherwise: a few units in the last place of the format, amplified
# by the depth of the model.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
VERIFIED_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Classification(Task[ClassificationTeacher, Sample]):
    """A classifier with its corpora.

    Attributes:
        pooled_width: D of the pooled states; None where they are not cached.
        reads_types: the teacher is told which text of a pair each token is of.
        head: what its outputs mean.
    """

    packs_documents = False

    pooled_width: int | None
    reads_types: bool = False
    head: Head = SINGLE

    @classmethod
    def prepared(cls, config: CaptureConfig, corpora: Mapping[str, Corpus]) -> Classification:
        """Load the teacher and settle the labels.

        Raises:
            UserError: if the teacher cannot be loaded or lacks what is asked for, or the labels are
                none of its classes or all of one class, or only some of the corpora are pairs.
        """
        _require_one_form(corpora)
        teacher = cls.load(config.forward, with_attention=config.layers.attention != "none")
        is_pair = corpora["labeled"].num_texts > 1
        if is_pair:
            _warn_of_no_separator(teacher)
        labeled = corpora["labeled"].with_class_names(teacher.id2label)
        _check_classes(labeled)
        return cls(
            teacher=teacher,
            corpora={**corpora, "labeled": labeled},
            max_length=teacher.max_length(config.forward.max_length),
            batch_tokens=config.forward.batch_tokens,
            pooled_width=find_pooled_width(teacher)
            if hidden_options(config.layers).pooled
            else None,
            layers=LayerPlan.prepared(config.layers, teacher, is_packed=cls.packs_documents),
            head=labeled.head or HEADS[teacher.heads[0]],
            reads_types=is_pair and reads_token_types(teacher.model, teacher.tokenizer),
        )

    @classmethod
    def heads(cls, config: TeacherConfig) -> tuple[HeadName, ...]:
        """By the teacher's configuration."""
        return labels_read_by(config)

    @classmethod
    def load(cls, config: TeacherConfig, *, with_attention: bool) -> ClassificationTeacher:
        """A sequence classifier."""
        return load_teacher(config, with_attention=with_attention)

    @classmethod
    def comparison(cls, reader: CacheReader, teacher: ClassificationTeacher) -> ClassesApart:
        """Of logits, and of pooled states where they are cached."""
        return ClassesApart(teacher, width_of_pooled(reader.manifest.schema))

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        return classification_schema(
            len(self.teacher.id2label),
            label=self.head.field(len(self.teacher.id2label)),
            has_token_types=self.reads_types,
            pooled_width=self.pooled_width,
            layer_fields=self.layers.fields,
        )

    @property
    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """The embedding table, where there is one; with pooled states, those of the tokens too."""
        found = {} if self.embeddings is None else {TABLE_FILE: self.embeddings.write}
        return found if self.pooled_width is None else found | {STATES_FILE: self._write_states}

    def settings(self) -> dict[str, Any]:
        """All that changes the cached values, but for the data."""
        record = describe(self.teacher.tokenizer, max_length=self.max_length)
        return {
            "task": "classification",
            "codec": "class_logits",
            "teacher": identity(self.teacher, record.files_sha256),
            "max_length": self.max_length,
            "truncation_side": record.truncation_side,
            # Absent where there are none, so that other caches keep their fingerprints.
            **({TOKEN_TYPES: True} if self.reads_types else {}),
            **self.head.settings,
            **self.layers.settings(),
        }

    def about(self) -> dict[str, Any]:
        """Class names, how the teacher's tables are stored, and what its maps lose."""
        return {
            "id2label": {str(class_id): name for class_id, name in enumerate(self._class_names)},
            TABLE: None if self.embeddings is None else self.embeddings.facts(),
            # Absent where it is not cached, so that other manifests stay as they were.
            **(
                {}
                if self.pooled_width is None
                else {STATES: {"num_rows": self._num_states, "width": self.pooled_width}}
            ),
            **self.measured_attention(),
        }

    def samples(self, documents: Sequence[Document]) -> list[Sample]:
        """Those that are not empty."""
        samples = tokenize(
            documents,
            self.teacher.tokenizer,
            max_length=self.max_length,
            with_types=self.reads_types,
        )
        self.teacher.require_rows([sample.input_ids for sample in samples])
        return samples

    def say(self, samples: Sequence[Sample], tap: LayerTap, on_batch: OnBatch) -> Said:
        """Class logits, exactly, and pooled states in float16.

        Raises:
            UserError: if a single sample does not fit into memory, a logit is not finite, or a
                state has a value that float16 does not hold.
        """
        outputs = run_teacher(
            self.teacher,
            [sample.input_ids for sample in samples],
            batch_tokens=self.batch_tokens,
            pooled_width=self.pooled_width,
            token_types=_types(samples),
            tap=tap,
            on_batch=on_batch,
        )
        logits = outputs.vectors["class_logits"]
        _refuse_not_finite(logits, samples)
        ids = b"".join(sample.sample_id for sample in samples)
        types = _types(samples) or []
        labels = [sample.label for sample in samples]
        pooled = {} if self.pooled_width is None else {POOLED: _half(outputs.vectors[POOLED])}
        return Said(
            fields={
                "sample_id": np.frombuffer(ids, f"V{SAMPLE_ID_BYTES}"),
                "input_ids": Ragged.from_arrays([sample.input_ids for sample in samples], "uint32"),
                **({TOKEN_TYPES: Ragged.from_arrays(types, "uint8")} if self.reads_types else {}),
                "label": self.head.stored(labels, len(self.teacher.id2label)),
                "class_logits": logits,
                **pooled,
            },
            num_halvings=outputs.num_halvings,
        )

    def listen(self, samples: Sequence[Sample], tap: LayerTap) -> None:
        """In batches, as a shard's samples are read."""
        run_teacher(
            self.teacher,
            [sample.input_ids for sample in samples],
            batch_tokens=self.batch_tokens,
            pooled_width=None,
            token_types=_types(samples),
            tap=tap,
        )

    def lengths(self, sample: Sample) -> list[int]:
        """Of one piece."""
        return [len(sample.input_ids)]

    def num_sharing(self, documents: Sequence[Document], samples: Sequence[Sample]) -> int:
        """Those that make a sample: the others are left out of the shard."""
        return len(samples)

    def num_truncated(self, samples: Sequence[Sample]) -> int:
        """Those that are longer than a sample."""
        return sum(sample.was_truncated for sample in samples)

    def findings(self) -> OnLabels | MeasuredOnLabels:
        """How often the teacher gives a document its label, or what measures other answers."""
        if self.head is not SINGLE:
            return MeasuredOnLabels(self.head)
        return OnLabels(
            confusion=Confusion(len(self.teacher.id2label)),
            class_ids=self.corpora["labeled"].class_ids,
            names=self._class_names,
        )

    @property
    def _class_names(self) -> tuple[str, ...]:
        """As the corpus calls them, where it does."""
        names = self.corpora["labeled"].label_names
        return names or tuple(name for _, name in sorted(self.teacher.id2label.items()))

    @property
    def _num_states(self) -> int:
        """Ids of the tokenizer that the teacher can read: some have tokens beyond its table."""
        return self.num_token_ids if self.embeddings is None else len(self.embeddings.rows)

    def _write_states(self, folder: Path) -> None:
        assert self.pooled_width is not None, "only then is there such a file"
        states = token_states(
            self.teacher,
            num_ids=self._num_states,
            pooled_width=self.pooled_width,
            batch_tokens=self.batch_tokens,
        )
        states.write(folder)


@dataclass(frozen=True, kw_only=True)
class OnLabels:
    """The teacher against the labels; `Findings`.

    Attributes:
        confusion: counts of both.
        class_ids: which class each label of the data stands for.
        names: of the classes.
    """

    confusion: Confusion
    class_ids: Mapping[str, int]
    names: Sequence[str]

    def add(self, fields: Fields) -> None:
        """Count them."""
        self.confusion.add(fields)

    def about(self) -> dict[str, Any]:
        """Accuracy and confusion; a warning where the ids seem to mean other classes."""
        found = self.confusion
        if not found.num:
            return {}
        fitting = found.fitting()
        if fitting is not None:
            pairs = (f"{label}={fitting.get(own, own)}" for label, own in self.class_ids.items())
            logger.warning(
                "the teacher gives %.1f %% of %s documents their label: by the classes that it "
                "gives most often, its ids mean others, and --label-map %s --overwrite would fit",
                *(100 * found.accuracy, f"{found.num:,}", shlex.quote(",".join(pairs))),
            )
        elif found.is_under_chance:
            logger.warning(
                "the teacher gives %.1f %% of %s documents their label, under the %.1f %% of "
                "chance: check that teacher and labels are of one task",
                *(100 * found.accuracy, f"{found.num:,}", 100 * found.chance),
            )
        return {ON_LABELS: found.to_json()}


class MeasuredOnLabels:
    """The teacher against labels of another kind than a class; `Findings`.

    Args:
        head: of the teacher.
    """

    def __init__(self, head: Head):
        self._head = head
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, fields: Fields) -> None:
        """Keep them."""
        labels, logits = np.asarray(fields["label"]), np.asarray(fields["class_logits"])
        is_known = self._head.has_label(labels)
        self._parts.append((logits[is_known], labels[is_known]))

    def about(self) -> dict[str, Any]:
        """The head's measures."""
        if not self._parts:
            return {}
        logits, labels = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        if not len(labels):
            return {}
        figures = self._head.metrics(logits, labels)
        known = {name: one for name, one in figures.items() if np.isfinite(one)}
        return {ON_LABELS: {"num_labeled": len(labels), **known}}


class ClassesApart:
    """How far cached class logits and pooled states are from a teacher's; a `Comparison`.

    Args:
        teacher: the one that made the cache.
        pooled_width: D of its pooled states; None where they are not cached.
    """

    def __init__(self, teacher: ClassificationTeacher, pooled_width: int | None):
        self._teacher = teacher
        self._pooled_width = pooled_width
        self._logit = self._pooled = 0.0

    def compare(self, samples: Sequence[StoredSample], tap_of: TapOf) -> None:
        """Each sample alone, which is what its values stand for, however they were cached."""
        again = run_teacher(
            self._teacher,
            [sample["input_ids"] for sample in samples],
            batch_tokens=VERIFIED_BATCH_TOKENS,
            pooled_width=self._pooled_width,
            token_types=[sample[TOKEN_TYPES] for sample in samples]
            if TOKEN_TYPES in samples[0]
            else None,
            batching=ALONE,
            tap=tap_of(samples),
        ).vectors
        cached = np.stack([sample["class_logits"] for sample in samples])
        # A NaN stays one.
        self._logit = float(np.maximum(self._logit, np.abs(again["class_logits"] - cached).max()))
        if self._pooled_width is not None:
            pooled = np.stack([sample[POOLED] for sample in samples])
            apart = states_apart(again[POOLED], pooled)
            self._pooled = float(np.maximum(self._pooled, apart.max()))

    def require_close(self, cache: Path, dtype: str) -> float:
        """The largest absolute difference of a logit.

        Raises:
            CheckFailed: naming the distance and the tolerance.
        """
        if not self._logit <= TOLERANCE[dtype]:
            raise CheckFailed(
                f"the teacher's logits differ by up to {self._logit:.2g} from those in {cache}, "
                f"expected at most {TOLERANCE[dtype]}: make the cache again with --overwrite"
            )
        if not self._pooled <= STATE_TOLERANCE[dtype]:
            raise CheckFailed(
                f"the teacher's pooled states are up to {self._pooled:.2g} of their length away "
                f"from those in {cache}, expected at most {STATE_TOLERANCE[dtype]}: make the cache "
                "again with --overwrite"
            )
        return self._logit


def _types(samples: Sequence[Sample]) -> list[np.ndarray] | None:
    """Of the samples' tokens; None where the teacher is told none, or there is no sample."""
    found = [sample.token_types for sample in samples if sample.token_types is not None]
    return found or None


def _require_one_form(corpora: Mapping[str, Corpus]) -> None:
    """Refuse pairs beside single texts.

    Raises:
        UserError: naming the corpus of each.
    """
    sources = {corpus.num_texts: corpus.config.source for corpus in corpora.values()}
    if len(sources) > 1:
        raise UserError(
            f"{sources[2]} is read as pairs of texts and {sources[1]} as single ones, and a "
            "teacher reads either: name both columns of either with --text-column, or take other "
            "unlabelled text (--unlabeled none takes none)"
        )


def _warn_of_no_separator(teacher: ClassificationTeacher) -> None:
    """As of GPT-2: its teacher has learned pairs in some other form, if it has."""
    tokenizer = teacher.tokenizer
    if tokenizer("a", "b")["input_ids"] == tokenizer("ab")["input_ids"] or (
        tokenizer("a", "b")["input_ids"]
        == tokenizer("a")["input_ids"] + tokenizer("b")["input_ids"]
    ):
        logger.warning(
            "the tokenizer of %s puts nothing between the texts of a pair (%s): if the teacher "
            "learned them in another form, write that form into one column",
            teacher.name,
            pair_form(tokenizer),
        )


def _half(pooled: np.ndarray) -> np.ndarray:
    return half(pooled, what="pooled states", option="--hidden pooled")


def _refuse_not_finite(logits: np.ndarray, samples: Sequence[Sample]) -> None:
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        first = samples[int(np.argmin(finite))].sample_id.hex()
        raise UserError(
            f"the teacher's logits of {int((~finite).sum())} samples are not finite (the first has "
            f"the id {first}): give --dtype float32, or bfloat16 where the device has it"
        )


def _check_classes(corpus: Corpus) -> None:
    """Refuse labels of one class; warn of classes that no document has.

    Raises:
        UserError: naming the class.
    """
    counts, names = corpus.label_counts(), corpus.label_names
    constant = corpus.constant_label()
    if constant is not None:
        num = len(corpus) - corpus.num_without_label
        raise UserError(
            f"all {num:,} labelled documents of {corpus.config.source} are of the "
            f"class {constant}: a classifier needs two, so raise --max-samples"
        )
    if counts is None or names is None:
        return
    absent = [name for name in names if name not in counts]
    if absent:
        logger.warning(
            "no document of %s has %s %s of the teacher's %d: check that its labels mean the "
            "teacher's classes, as listed above",
            *(corpus.config.source, "the class" if len(absent) == 1 else "the classes"),
            *(
                ", ".join(absent[:NUM_NAMED]) + (", ..." if len(absent) > NUM_NAMED else ""),
                len(names),
            ),
        )
