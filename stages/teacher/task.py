"""What stage one asks of a task, and all of it that does not depend on the kind of teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np

from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Fields, Schema, bytes_per_position, fixed_bytes
from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.codecs.measure import CodecLoss
from teacher_cache.stages.data.corpus import Corpus, Document
from teacher_cache.stages.heads import SINGLE, HeadName
from teacher_cache.stages.models.device import dtype_name, environment
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.config import CaptureConfig, TeacherConfig
from teacher_cache.stages.teacher.layers import (
    AnySample,
    KeptLayers,
    LayerPlan,
    LayerTap,
    RowErrors,
    first_samples,
)
from teacher_cache.stages.teacher.load import Teacher
from teacher_cache.stages.teacher.tables import StoredTable, embedding_table

NUM_MEASURED_DOCUMENTS = 64
AnyTeacher = TypeVar("AnyTeacher", bound=Teacher)

StoredSample = Mapping[str, np.ndarray]
"""A sample's fields by name, as the reader gives them."""
TapOf = Callable[[Sequence[StoredSample]], LayerTap]
"""What listens to the layers while the teacher reads these samples again."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A shard before it is committed.

    Attributes:
        fields: of the task's schema, in the samples' order.
        num_truncated: documents of which tokens were cut off.
        environment: what the bits depend on besides the settings, for the sidecar.
    """

    fields: Fields
    num_truncated: int
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a teacher said of some samples.

    Attributes:
        fields: in the samples' order, but for those of its layers.
        num_halvings: how often a batch ran out of memory and was halved.
    """

    fields: Fields
    num_halvings: int


class Findings(Protocol):
    """What the shards of the main corpus tell together."""

    def add(self, fields: Fields) -> None:
        """Some samples, with the fields of the schema."""
        ...

    def about(self) -> dict[str, Any]:
        """For the manifest, once all are added; a person is told what is remarkable."""
        ...


class Comparison(Protocol):
    """How far what a cache holds of samples is from what its teacher says of them again."""

    def compare(self, samples: Sequence[StoredSample], tap_of: TapOf) -> None:
        """Run the teacher over some samples and remember the largest distances.

        Raises:
            UserError: if a single sample does not fit into memory.
        """
        ...

    def require_close(self, cache: Path, dtype: str) -> float:
        """The distance that a person is told; of no sample, 0.

        Args:
            cache: its folder, for the message.
            dtype: number format of the cache.

        Raises:
            CheckFailed: if number format and encoding do not explain it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[AnyTeacher, AnySample]):
    """A teacher with its corpora, ready to be cached.

    Attributes:
        packs_documents: a sample holds several documents.
        teacher: on its device.
        corpora: by split, as the teacher reads them.
        max_length: the longest sample in tokens.
        batch_tokens: padded tokens in a forward batch.
        layers: maps and states that are cached.
    """

    packs_documents: ClassVar[bool]

    teacher: AnyTeacher
    corpora: Mapping[str, Corpus]
    max_length: int
    batch_tokens: int
    layers: LayerPlan

    # Before a teacher is there.

    @classmethod
    @abstractmethod
    def prepared(cls, config: CaptureConfig, corpora: Mapping[str, Corpus]) -> Self:
        """Load the teacher and settle what is cached of it.

        Args:
            config: the teacher and what to cache of it, that `check_options` let pass.
            corpora: by split; `labeled` is read with labels where the task has any.

        Raises:
            UserError: if the teacher cannot be loaded, or it or the data lack what is asked for.
            CheckFailed: if its ids cannot be aligned as asked.
        """

    @classmethod
    def heads(cls, config: TeacherConfig) -> tuple[HeadName, ...]:
        """Kinds of head for which labels may be written, before the teacher is loaded.

        Raises:
            UserError: if the teacher's is not served.
        """
        return (SINGLE.name,)

    @classmethod
    @abstractmethod
    def load(cls, config: TeacherConfig, *, with_attention: bool) -> AnyTeacher:
        """The teacher alone.

        Raises:
            UserError: if it cannot be loaded.
        """

    @classmethod
    @abstractmethod
    def comparison(cls, reader: CacheReader, teacher: AnyTeacher) -> Comparison:
        """What compares a cache with the teacher that made it.

        Raises:
            UserError: if the cache lacks what its samples decode with.
            CheckFailed: if a file of it is damaged.
        """

    @classmethod
    def assumed_bytes_per_token(cls, config: CodecConfig) -> float | None:
        """`bytes_per_token` of most teachers; None where it takes the teacher to know."""
        return None

    # What is cached of it.

    @property
    def formers(self) -> Sequence[Self]:
        """As earlier releases cached it where that is not the same, to go on with their caches."""
        return ()

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """The fields of a sample."""

    @property
    @abstractmethod
    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """Files of the cache's `teacher` folder beside tokenizer and configuration.

        By name, what writes each into the folder it is given, atomically and deterministically.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that changes the cached values, but for the data."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What else the manifest says of it."""

    @abstractmethod
    def samples(self, documents: Sequence[Document]) -> list[AnySample]:
        """The samples of a shard's documents."""

    @abstractmethod
    def say(self, samples: Sequence[AnySample], tap: LayerTap, on_batch: OnBatch) -> Said:
        """Run the teacher over samples.

        Args:
            samples: of one shard.
            tap: that listens to its layers.
            on_batch: called with samples and tokens after each batch.

        Raises:
            UserError: if a single sample does not fit into memory, or what the teacher says cannot
                be kept.
        """

    @abstractmethod
    def listen(self, samples: Sequence[AnySample], tap: LayerTap) -> None:
        """Run the teacher over a few samples for what its layers say alone."""

    @abstractmethod
    def lengths(self, sample: AnySample) -> list[int]:
        """Tokens of each of a sample's pieces."""

    @abstractmethod
    def num_sharing(self, documents: Sequence[Document], samples: Sequence[AnySample]) -> int:
        """Documents that the bytes of their samples count for."""

    def num_truncated(self, samples: Sequence[AnySample]) -> int:
        """Documents of which tokens were cut off."""
        return 0

    def samples_of_shard(self, documents: Sequence[Document]) -> list[AnySample]:
        """`samples`, where a person may be told what is remarkable about them."""
        return self.samples(documents)

    def capture(self, documents: Sequence[Document], on_batch: OnBatch) -> Captured:
        """Run the teacher over a shard's documents, and keep what is asked for.

        Raises:
            UserError: as `say`.
        """
        samples = self.samples_of_shard(documents)
        kept = KeptLayers(self.layers)
        said = self.say(samples, LayerTap(self.teacher.model, self.layers, kept), on_batch)
        return Captured(
            fields=said.fields | kept.fields(len(samples)),
            num_truncated=self.num_truncated(samples),
            environment=recorded_environment(
                self.teacher, batch_tokens=self.batch_tokens, num_halvings=said.num_halvings
            ),
        )

    def findings(self) -> Findings | None:
        """What is to be found out of all shards; None where that is nothing."""
        return None

    def measured_attention(self) -> dict[str, Any]:
        """What storing maps loses on the first documents; nothing where none are stored."""
        if self.layers.attention is None:
            return {}
        errors = RowErrors(self.layers.attention)
        tap = LayerTap(self.teacher.model, self.layers, errors)
        self.listen(first_samples(self.measured_samples()), tap)
        return {"attention": errors.to_json()}

    def measured_samples(self) -> list[AnySample]:
        """Those of the first documents."""
        corpus = self.corpora["labeled"]
        return self.samples(corpus.documents(0, min(NUM_MEASURED_DOCUMENTS, len(corpus))))

    @property
    def num_token_ids(self) -> int:
        """One more than the largest id of the teacher's tokenizer."""
        return max(self.teacher.tokenizer.get_vocab().values()) + 1

    @cached_property
    def embeddings(self) -> StoredTable | None:
        """The rows of the tokenizer's ids in the teacher's table; None where it has none."""
        return embedding_table(self.teacher.model, num_ids=self.num_token_ids)

    # What it will take.

    @property
    def codec_loss(self) -> CodecLoss | None:
        """What its codec loses on the first documents; None where it has none, or they say nothing.

        Raises:
            UserError: if states and head do not give the teacher's logits.
        """
        return None

    @property
    def bytes_per_token(self) -> float | None:
        """Of what is kept a position; None of a task that keeps one answer a sample."""
        return None

    @property
    def num_ids(self) -> int | None:
        """Of the support of its distributions; None where these are of classes."""
        return None

    def bytes_per_document(self, documents: Sequence[Document]) -> float | None:
        """What a document takes in a shard, by a few; None where they make no sample."""
        samples = self.samples(documents)
        if not samples:
            return None
        own = [spec for spec in self.schema if spec not in self.layers.fields]
        per_token = self.bytes_per_token
        if per_token is None:
            per_token = bytes_per_position(tuple(own))
        # Of each ragged field the sample's end is stored too.
        per_sample = fixed_bytes(self.schema) + 4 * sum(spec.is_ragged for spec in own)
        num_bytes = _num_tokens(samples) * per_token + len(samples) * per_sample
        return (num_bytes + self._layer_bytes(samples)) / self.num_sharing(documents, samples)

    def layer_bytes_per_document(self, documents: Sequence[Document]) -> float:
        """What of that are maps and states of the teacher's layers."""
        return self._layer_bytes(self.samples(documents)) / len(documents)

    def tokens_per_document(self, documents: Sequence[Document]) -> float:
        """Mean number of tokens, empty documents included."""
        return _num_tokens(self.samples(documents)) / len(documents)

    def _layer_bytes(self, samples: Sequence[AnySample]) -> int:
        return sum(self.layers.num_bytes(self.lengths(sample)) for sample in samples)


def _num_tokens(samples: Sequence[Any]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def recorded_environment(
    teacher: Teacher, *, batch_tokens: int, num_halvings: int
) -> dict[str, Any]:
    """What the bits of a shard depend on besides the settings."""
    return {
        **environment(teacher.device),
        "attention": teacher.model.config._attn_implementation,
        "dtype": dtype_name(teacher.dtype),
        "batch_tokens": batch_tokens,
        "num_halvings": num_halvings,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
