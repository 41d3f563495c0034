"""The classification task: a document is a sample, and its class logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import (
    NO_LABEL,
    POOLED,
    SAMPLE_ID_BYTES,
    Ragged,
    Schema,
    classification_schema,
    fixed_bytes,
)
from teacher_cache.stages.data.corpus import Corpus
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.data.tokenization import Sample, tokenize
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.config import ShardConfig
from teacher_cache.stages.teacher.forward import find_pooled_width, run_teacher
from teacher_cache.stages.teacher.layers import (
    NO_LAYERS,
    KeptLayers,
    LayerPlan,
    LayerTap,
    RowErrors,
    first_samples,
    half,
)
from teacher_cache.stages.teacher.load import ClassificationTeacher, identity, load_teacher
from teacher_cache.stages.teacher.options import hidden_options
from teacher_cache.stages.teacher.tables import (
    STATES,
    STATES_FILE,
    TABLE,
    TABLE_FILE,
    StoredTable,
    embedding_table,
    token_states,
)
from teacher_cache.stages.teacher.task import Captured, recorded_environment
from teacher_cache.stages.tokens.record import describe


def capture(
    teacher: ClassificationTeacher,
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    on_batch: OnBatch,
    layers: LayerPlan = NO_LAYERS,
    pooled_width: int | None = None,
) -> Captured:
    """Run the teacher over a shard's samples and keep its class logits, exactly.

    Its pooled states too, in float16, and what is asked for of its layers.

    Args:
        teacher: on its device.
        samples: of one shard.
        batch_tokens: padded tokens in a forward batch.
        on_batch: called with samples and tokens after each batch.
        layers: which maps and states to keep.
        pooled_width: D of the pooled states; None leaves them out.

    Raises:
        UserError: if a single sample does not fit into memory, a logit is not finite, or a state
            has a value that float16 does not hold.
    """
    kept = KeptLayers(layers)
    outputs = run_teacher(
        teacher,
        [sample.input_ids for sample in samples],
        batch_tokens=batch_tokens,
        pooled_width=pooled_width,
        tap=LayerTap(teacher.model, layers, kept),
        on_batch=on_batch,
    )
    logits = outputs.vectors["class_logits"]
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        first = samples[int(np.argmin(finite))].sample_id.hex()
        raise UserError(
            f"the teacher's logits of {int((~finite).sum())} samples are not finite (the first has "
            f"the id {first}): give --dtype float32, or bfloat16 where the device has it"
        )
    ids = b"".join(sample.sample_id for sample in samples)
    labels = [NO_LABEL if sample.label is None else sample.label for sample in samples]
    return Captured(
        fields={
            "sample_id": np.frombuffer(ids, f"V{SAMPLE_ID_BYTES}"),
            "input_ids": Ragged.from_arrays([sample.input_ids for sample in samples], "uint32"),
            "label": np.array(labels, np.int32),
            "class_logits": logits,
            **({} if pooled_width is None else {POOLED: _half(outputs.vectors[POOLED])}),
            **kept.fields(len(samples)),
        },
        num_truncated=sum(sample.was_truncated for sample in samples),
        environment=recorded_environment(
            teacher, batch_tokens=batch_tokens, num_halvings=outputs.num_halvings
        ),
    )


def _half(pooled: np.ndarray) -> np.ndarray:
    return half(pooled, what="pooled states", option="--hidden pooled")


NUM_PROBED_DOCUMENTS = 64


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A classifier with its corpora; a `Task`.

    Attributes:
        corpora: by split; the labelled one has the teacher's class ids.
        batch_tokens: padded tokens in a forward batch.
        pooled_width: D of the pooled states; None where they are not cached.
        layers: maps and states that are cached.
        embeddings: None where the teacher has no table of them.
    """

    teacher: ClassificationTeacher
    corpora: Mapping[str, Corpus]
    max_length: int
    batch_tokens: int
    pooled_width: int | None
    layers: LayerPlan
    embeddings: StoredTable | None

    @classmethod
    def prepared(cls, config: ShardConfig, corpora: Mapping[str, Corpus]) -> Classification:
        """Load the teacher and settle the labels.

        Args:
            config: the teacher and what to cache of it.
            corpora: by split; `labeled` is read with labels.

        Raises:
            UserError: if the teacher cannot be loaded or lacks what is asked for, or the labels are
                none of its classes or all of one class.
        """
        teacher = load_teacher(config, with_maps=config.attention != "none")
        labeled = corpora["labeled"].with_class_names(teacher.id2label)
        _require_two_classes(labeled)
        return cls(
            teacher=teacher,
            corpora={**corpora, "labeled": labeled},
            max_length=teacher.max_length(config.max_length),
            batch_tokens=config.batch_tokens,
            pooled_width=find_pooled_width(teacher) if hidden_options(config).pooled else None,
            layers=LayerPlan.prepared(config, teacher),
            embeddings=embedding_table(teacher.model, num_ids=_num_ids(teacher)),
        )

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        return classification_schema(
            len(self.teacher.id2label),
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
            **self.layers.settings(),
        }

    def about(self) -> dict[str, Any]:
        """Class names, how the teacher's tables are stored, and what its maps lose."""
        names = self.corpora["labeled"].class_names()
        return {
            "id2label": {str(class_id): name for class_id, name in enumerate(names)},
            TABLE: None if self.embeddings is None else self.embeddings.facts(),
            # Absent where it is not cached, so that other manifests stay as they were.
            **(
                {}
                if self.pooled_width is None
                else {STATES: {"num_rows": self._num_states, "width": self.pooled_width}}
            ),
            **self._probed_maps(),
        }

    def bytes_per_document(self, documents: Sequence[Document]) -> float | None:
        """A sample's fields of one size, its mean number of ids and where they end."""
        samples = self._tokenized(documents)
        if not samples:
            return None
        tokens = sum(len(sample.input_ids) for sample in samples) / len(samples)
        layers = self.layer_bytes_per_document(documents) * len(documents) / len(samples)
        return fixed_bytes(self.schema) + (4 * tokens + 4) + layers

    def layer_bytes_per_document(self, documents: Sequence[Document]) -> float:
        """Of maps and states."""
        samples = self._tokenized(documents)
        of_all = sum(self.layers.num_bytes([len(sample.input_ids)]) for sample in samples)
        return of_all / len(documents)

    def tokens_per_document(self, documents: Sequence[Document]) -> float:
        """Mean number of tokens, empty documents included."""
        samples = self._tokenized(documents)
        return sum(len(sample.input_ids) for sample in samples) / len(documents)

    def capture(self, documents: Sequence[Document], on_batch: OnBatch) -> Captured:
        """Class logits, and states and maps where they are asked for."""
        return capture(
            self.teacher,
            self._tokenized(documents),
            batch_tokens=self.batch_tokens,
            on_batch=on_batch,
            layers=self.layers,
            pooled_width=self.pooled_width,
        )

    def _tokenized(self, documents: Sequence[Document]) -> list[Sample]:
        return tokenize(documents, self.teacher.tokenizer, max_length=self.max_length)

    def _probed_maps(self) -> dict[str, Any]:
        """What storing maps loses on the first documents; nothing where none are stored."""
        if self.layers.attention is None:
            return {}
        corpus, errors = self.corpora["labeled"], RowErrors(self.layers.attention)
        documents = corpus.documents(0, min(NUM_PROBED_DOCUMENTS, len(corpus)))
        run_teacher(
            self.teacher,
            [sample.input_ids for sample in first_samples(self._tokenized(documents))],
            batch_tokens=self.batch_tokens,
            pooled_width=None,
            tap=LayerTap(self.teacher.model, self.layers, errors),
        )
        return {"attention": errors.to_json()}

    @property
    def _num_states(self) -> int:
        """Ids of the tokenizer that the teacher can read: some have tokens beyond its table."""
        return _num_ids(self.teacher) if self.embeddings is None else len(self.embeddings.rows)

    def _write_states(self, folder: Path) -> None:
        assert self.pooled_width is not None, "only then is there such a file"
        states = token_states(
            self.teacher,
            num_ids=self._num_states,
            pooled_width=self.pooled_width,
            batch_tokens=self.batch_tokens,
        )
        states.write(folder)


def _num_ids(teacher: ClassificationTeacher) -> int:
    return max(teacher.tokenizer.get_vocab().values()) + 1


def _require_two_classes(corpus: Corpus) -> None:
    present = [name for name, count in (corpus.label_counts() or {}).items() if count]
    if len(present) < 2:
        raise UserError(
            f"all {len(corpus):,} labelled documents of {corpus.config.source} are of the class "
            f"{', '.join(present)}: a classifier needs two, so raise --max-samples"
        )
