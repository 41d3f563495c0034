"""The language-modelling task: documents are packed, and each position's distribution is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.schema import (
    Schema,
    bytes_per_position,
    fixed_bytes,
    language_model_schema,
)
from teacher_cache.stages.codecs.capture import (
    arrays_of,
    packed_fields,
    reduce_positions,
)
from teacher_cache.stages.codecs.options import codec_of
from teacher_cache.stages.codecs.probe import Probe, probe_codec
from teacher_cache.stages.codecs.sampled import DRAW_SEED, draws_of
from teacher_cache.stages.data.corpus import Corpus
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.data.packing import Packed, PackedSample, pack, packing_settings
from teacher_cache.stages.models.head import HEAD_FILE, LanguageModelHead
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.capture_alignment import CaptureAlignment, aligned
from teacher_cache.stages.teacher.config import ShardConfig
from teacher_cache.stages.teacher.layers import (
    KeptLayers,
    LayerPlan,
    LayerTap,
    RowErrors,
    first_samples,
)
from teacher_cache.stages.teacher.load import LanguageModelTeacher, identity, load_language_model
from teacher_cache.stages.teacher.positions import Reduce, Slice, listen_to_packed, run_positions
from teacher_cache.stages.teacher.tables import TABLE, TABLE_FILE, StoredTable, embedding_table
from teacher_cache.stages.teacher.task import Captured, recorded_environment
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.support import (
    AnySupport,
    MappedSupport,
    Support,
    files_of,
    states_support,
)

NUM_PROBED_DOCUMENTS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """A causal language model with its corpora; a `Task`.

    Attributes:
        corpora: by split, read without labels: every next token is one.
        batch_tokens: padded tokens in a forward batch.
        alignment: over whose ids the distributions are cached.
        codec: what is kept of a position.
        head: of the support, where states are cached; None for other codecs.
        layers: maps and states that are cached beside what the codec keeps.
    """

    teacher: LanguageModelTeacher
    corpora: Mapping[str, Corpus]
    max_length: int
    batch_tokens: int
    alignment: CaptureAlignment
    codec: AnyCodec
    head: LanguageModelHead | None
    layers: LayerPlan

    @classmethod
    def prepared(cls, config: ShardConfig, corpora: Mapping[str, Corpus]) -> LanguageModeling:
        """Load the teacher and settle its support and codec.

        Args:
            config: the teacher and what to cache of it.
            corpora: by split.

        Raises:
            UserError: if the teacher cannot be loaded or lacks what is asked for, or the codec
                cannot serve it.
            CheckFailed: if its ids cannot be aligned as asked.
        """
        teacher = load_language_model(config, with_maps=config.attention != "none")
        alignment = aligned(
            config, teacher, Support.of_tokenizer(teacher.tokenizer, teacher.num_logits)
        )
        head = LanguageModelHead.of(teacher.model) if config.codec == "hidden" else None
        return cls(
            teacher=teacher,
            corpora=corpora,
            max_length=teacher.max_length(config.max_length),
            batch_tokens=config.batch_tokens,
            alignment=alignment,
            codec=codec_of(
                config,
                support_size=alignment.support.size,
                width=0 if head is None else head.weight.shape[1],
                has_unmatched=isinstance(alignment.support, MappedSupport),
            ),
            head=head,
            layers=LayerPlan.prepared(config, teacher, is_packed=True),
        )

    @property
    def support(self) -> AnySupport:
        """The ids that the cached distributions are over."""
        return self.alignment.support

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        return language_model_schema(
            self.codec.fields, is_packed=True, layer_fields=self.layers.fields
        )

    @property
    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """The embedding table, where there is one; the map of a student's ids; the states' head."""
        found = dict(files_of(self.support))
        if self.embeddings is not None:
            found[TABLE_FILE] = self.embeddings.write
        if self.head is not None:
            found[HEAD_FILE] = self.head.of_support(states_support(self.support)).write
        return found

    @cached_property
    def embeddings(self) -> StoredTable | None:
        """The rows of the teacher's own ids in its table, for students to start from."""
        num_ids = max(self.teacher.tokenizer.get_vocab().values()) + 1
        return embedding_table(self.teacher.model, num_ids=num_ids)

    def settings(self) -> dict[str, Any]:
        """All that changes the cached values, but for the data."""
        record = describe(self.teacher.tokenizer, max_length=self.max_length)
        return {
            "task": "lm",
            "codec": self.codec.settings,
            "support": self.support.settings,
            "teacher": identity(self.teacher, record.files_sha256),
            "packing": packing_settings(
                self.teacher.tokenizer, max_length=self.max_length, document_end="eos"
            ),
            "max_length": self.max_length,
            **({"draw_seed": DRAW_SEED} if isinstance(self.codec, SampledCodec) else {}),
            **self.layers.settings(),
        }

    def about(self) -> dict[str, Any]:
        """What codec and maps cost and lose on the first documents, and how tables are stored."""
        probe = self.probe
        found = self.alignment.about | ({} if probe is None else {"probe": probe.to_json()})
        found[TABLE] = None if self.embeddings is None else self.embeddings.facts()
        found |= self._probed_maps()
        return found if self.head is None else found | {"language_model_head": self.head.facts()}

    @cached_property
    def probe(self) -> Probe | None:
        """Bytes and reconstruction error on the first documents; None if they predict nothing.

        Raises:
            UserError: if states and head do not give the teacher's logits.
        """
        return probe_codec(self.teacher, self._first_samples(), self.codec, self.support, self.head)

    def bytes_per_document(self, documents: Sequence[Document]) -> float | None:
        """A document's share of the samples' fields, by the heads that the probe found."""
        packed = self._pack(documents)
        if not packed.samples:
            return None
        # Of each ragged field the sample's end is stored too.
        ragged = language_model_schema(self.codec.fields, is_packed=True)
        per_sample = fixed_bytes(self.schema) + 4 * sum(spec.is_ragged for spec in ragged)
        tokens = packed.num_tokens * self.bytes_per_token
        of_codec = (tokens + len(packed.samples) * per_sample) / len(documents)
        return of_codec + self.layer_bytes_per_document(documents)

    def layer_bytes_per_document(self, documents: Sequence[Document]) -> float:
        """Of maps and states."""
        samples = self._pack(documents).samples
        pieces = [np.bincount(sample.segment).tolist() for sample in samples]
        return sum(self.layers.num_bytes(lengths) for lengths in pieces) / len(documents)

    def tokens_per_document(self, documents: Sequence[Document]) -> float:
        """Mean number of tokens, empty documents included."""
        return self._pack(documents).num_tokens / len(documents)

    @property
    def bytes_per_token(self) -> float:
        """Of all of a sample's fields but those of layers, which grow in other ways."""
        return bytes_per_token(self.codec, None if self.probe is None else self.probe.num_ids)

    def capture(self, documents: Sequence[Document], on_batch: OnBatch) -> Captured:
        """Pack a shard's documents and keep what the codec keeps of each position."""
        packed = self._pack(documents)
        if packed.num_continued:
            logger.info(
                "%s of %s documents of this shard are longer than a sample: each goes on in the "
                "next one, without what stands before",
                f"{packed.num_continued:,}",
                f"{len(documents):,}",
            )
        kept = KeptLayers(self.layers)
        outputs = run_positions(
            self.teacher,
            packed.samples,
            self._reduce(packed.samples),
            batch_tokens=self.batch_tokens,
            tap=LayerTap(self.teacher.model, self.layers, kept),
            on_batch=on_batch,
        )
        return Captured(
            fields=packed_fields(self.codec, packed.samples, outputs.values)
            | kept.fields(len(packed.samples)),
            num_truncated=0,
            environment=recorded_environment(
                self.teacher, batch_tokens=self.batch_tokens, num_halvings=outputs.num_halvings
            ),
        )

    def _first_samples(self) -> list[PackedSample]:
        corpus = self.corpora["labeled"]
        documents = corpus.documents(0, min(NUM_PROBED_DOCUMENTS, len(corpus)))
        return self._pack(documents).samples

    def _probed_maps(self) -> dict[str, Any]:
        """What storing maps loses on the first documents; nothing where none are stored."""
        if self.layers.attention is None:
            return {}
        errors = RowErrors(self.layers.attention)
        tap = LayerTap(self.teacher.model, self.layers, errors)
        listen_to_packed(self.teacher, first_samples(self._first_samples()), tap)
        return {"attention": errors.to_json()}

    def _pack(self, documents: Sequence[Document]) -> Packed:
        return pack(documents, self.teacher.tokenizer, max_length=self.max_length)

    def _reduce(self, samples: Sequence[PackedSample]) -> Reduce:
        drawn_at = draws_of(self.codec, samples)

        def reduce(part: Slice) -> dict[str, np.ndarray]:
            reduced, _ = reduce_positions(
                self.codec,
                self.support,
                part.logits,
                part.next_ids.where(part.counts, -1),
                states=part.states,
                drawn_at=None if drawn_at is None else drawn_at[part.places.cpu().numpy()],
            )
            return arrays_of(self.codec, reduced)

        return reduce


def bytes_per_token(codec: AnyCodec, num_ids: float | None = None) -> float:
    """Stored bytes of a position, the token itself included.

    Args:
        codec: of the cache.
        num_ids: mean stored ids of a position, where that differs; the most, where not given.
    """
    tokens = bytes_per_position(language_model_schema((), is_packed=True))
    return tokens + codec.bytes_per_token(num_ids)
