"""What stage one asks of a task: the part of it that depends on the kind of teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from teacher_cache.cache.schema import Fields, Schema
from teacher_cache.stages.data.corpus import Corpus
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.models.device import dtype_name, environment
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.load import Teacher


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


class Task(Protocol):
    """A teacher with its corpora, ready to be cached."""

    @property
    def teacher(self) -> Teacher:
        """On its device."""
        ...

    @property
    def corpora(self) -> Mapping[str, Corpus]:
        """By split, as the teacher reads them."""
        ...

    @property
    def max_length(self) -> int:
        """The longest sample in tokens."""
        ...

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        ...

    @property
    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """Files of the cache's `teacher` folder beside tokenizer and configuration.

        By name, what writes each into the folder it is given, atomically and deterministically.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """All that changes the cached values, but for the data."""
        ...

    def about(self) -> dict[str, Any]:
        """What else the manifest says of it."""
        ...

    def bytes_per_document(self, documents: Sequence[Document]) -> float | None:
        """What a document takes in a shard, by a few; None where they make no sample."""
        ...

    def layer_bytes_per_document(self, documents: Sequence[Document]) -> float:
        """What of that are maps and states of the teacher's layers."""
        ...

    def tokens_per_document(self, documents: Sequence[Document]) -> float:
        """Mean number of tokens, empty documents included."""
        ...

    def capture(self, documents: Sequence[Document], on_batch: OnBatch) -> Captured:
        """Run the teacher over a shard's documents.

        Raises:
            UserError: if a single sample does not fit into memory, or what the teacher says
                cannot be kept.
        """
        ...


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
