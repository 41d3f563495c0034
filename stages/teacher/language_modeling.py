"""The language-modelling task: documents are packed, and each position's distribution is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.interface import Codec, Reduced, has_rows, rows_of
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import (
    NEXT_LOG_PROB,
    NO_LABEL,
    Schema,
    bytes_per_position,
    language_model_schema,
)
from teacher_cache.stages.codecs.capture import draws_of, packed_fields, reduce_positions
from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.codecs.interface import Positions
from teacher_cache.stages.codecs.measure import (
    CodecLoss,
    first_positions,
    kl_to_decoded,
    measure_codec,
    measured_temperatures,
)
from teacher_cache.stages.codecs.named import (
    chosen_room,
    codec_of,
    given_attributes,
    open_codec,
    room_of,
)
from teacher_cache.stages.data.conversations import ChatReading, refuse_without_conversations
from teacher_cache.stages.data.corpus import Corpus, Document
from teacher_cache.stages.data.packing import (
    Packed,
    PackedSample,
    Piece,
    pack,
    packing_settings,
    packing_version,
)
from teacher_cache.stages.models.batching import ALONE
from teacher_cache.stages.models.causal import final_states, head_logits
from teacher_cache.stages.models.head import HEAD_FILE, LanguageModelHead
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.capture_alignment import CaptureAlignment, aligned
from teacher_cache.stages.teacher.config import CaptureConfig, ChatConfig, TeacherConfig
from teacher_cache.stages.teacher.forward import Slice, listen_to_packed, run_positions
from teacher_cache.stages.teacher.layers import LayerPlan, LayerTap
from teacher_cache.stages.teacher.load import LanguageModelTeacher, identity, load_language_model
from teacher_cache.stages.teacher.tables import TABLE, TABLE_FILE
from teacher_cache.stages.teacher.task import Said, StoredSample, TapOf, Task
from teacher_cache.stages.tokens.chat_template import CHAT_FILE, listed_ids
from teacher_cache.stages.tokens.frame import surroundings
from teacher_cache.stages.tokens.record import describe
from teacher_cache.stages.tokens.support import (
    AnySupport,
    MappedSupport,
    Support,
    files_of,
    states_support,
    support_of_cache,
)

ASSUMED_IDS = 2**16  # ids take 2 bytes up to here, which is most vocabularies
# Of a position, nats: about half the square of what a logit may differ by, and the codec's own.
KL_TOLERANCE = {"float32": 5e-3, "bfloat16": 0.1, "float16": 0.01}
LOG_PROB_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}
HALF_STEP = 2.0**-10  # of a value in f16, relative
VERIFIED_BATCH_TOKENS = 8192

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LanguageModeling(Task[LanguageModelTeacher, PackedSample]):
    """A causal language model with its corpora, read without labels: every next token is one.

    Attributes:
        alignment: over whose ids the distributions are cached.
        codec: what is kept of a position.
        former_codec: what an earlier release made of the same options; None where it is the same.
        head: of the teacher, where states are cached; None for other codecs.
        packing: `packing_version`.
        chat: how conversations are read; None of texts.
    """

    packs_documents = True

    alignment: CaptureAlignment
    codec: Codec
    former_codec: Codec | None
    head: LanguageModelHead | None
    packing: int
    chat: ChatReading | None = None

    @classmethod
    def prepared(cls, config: CaptureConfig, corpora: Mapping[str, Corpus]) -> LanguageModeling:
        """Load the teacher and settle its support and codec.

        Raises:
            UserError: if the teacher cannot be loaded or lacks what is asked for, or the codec
                cannot serve it.
            CheckFailed: if its ids cannot be aligned as asked.
        """
        teacher = cls.load(config.forward, with_attention=config.layers.attention != "none")
        alignment = aligned(
            config, teacher, Support.of_tokenizer(teacher.tokenizer, teacher.num_logits)
        )
        room = chosen_room(config.kept)
        head = room.head_of(teacher.model)
        max_length = teacher.max_length(config.forward.max_length)
        chat, corpora = _rendered(config.chat, corpora, teacher, max_length)
        if chat is None:
            _log_frame(teacher.tokenizer)
        codec = codec_of(
            config.kept,
            support_size=alignment.support.size,
            width=0 if head is None else head.weight.shape[1],
            has_unmatched=isinstance(alignment.support, MappedSupport),
        )
        return cls(
            teacher=teacher,
            corpora=corpora,
            max_length=max_length,
            batch_tokens=config.forward.batch_tokens,
            alignment=alignment,
            codec=codec,
            former_codec=room.former(codec, given_attributes(config.kept, codec.name)),
            head=head,
            packing=packing_version(teacher.tokenizer),
            layers=LayerPlan.prepared(config.layers, teacher, is_packed=cls.packs_documents),
            chat=chat,
        )

    @property
    def formers(self) -> Sequence[LanguageModeling]:
        """With an earlier codec, or packed as before each piece got what is put around a text."""
        codecs = [self.codec, *([] if self.former_codec is None else [self.former_codec])]
        packings = dict.fromkeys((self.packing, 1))
        found = [
            replace(self, codec=codec, packing=packing) for packing in packings for codec in codecs
        ]
        return found[1:]

    @classmethod
    def load(cls, config: TeacherConfig, *, with_attention: bool) -> LanguageModelTeacher:
        """A causal language model."""
        return load_language_model(config, with_attention=with_attention)

    @classmethod
    def comparison(cls, reader: CacheReader, teacher: LanguageModelTeacher) -> PositionsApart:
        """Of distributions and of the next tokens' log-probs."""
        return PositionsApart(
            teacher,
            open_codec(reader, teacher.device),
            support_of_cache(reader.cache, reader.manifest, teacher.tokenizer, teacher.num_logits),
        )

    @classmethod
    def assumed_bytes_per_token(cls, config: CodecConfig) -> float | None:
        """Of a usual vocabulary; what keeps all of a distribution takes the teacher to know."""
        if chosen_room(config).lacks is None:
            return None
        return bytes_per_token(codec_of(config, support_size=ASSUMED_IDS, width=0))

    @property
    def support(self) -> AnySupport:
        """The ids that the cached distributions are over."""
        return self.alignment.support

    @property
    def schema(self) -> Schema:
        """The fields of a sample."""
        return language_model_schema(
            self.codec.fields,
            is_packed=True,
            has_continues=self.packing > 1,
            at_counted=self.at_counted,
            layer_fields=self.layers.fields,
        )

    @property
    def at_counted(self) -> bool:
        """Whether distributions are kept where they count alone, as some tokens are not learned."""
        return self.chat is not None and self.chat.config.loss_on != "all"

    @property
    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """The embedding table, where there is one; the map of a student's ids; the states' head.

        And how conversations are read.
        """
        found = dict(files_of(self.support))
        if self.embeddings is not None:
            found[TABLE_FILE] = self.embeddings.write
        counts = self.corpora["labeled"].chat_counts
        if self.chat is not None and counts is not None:
            found[CHAT_FILE] = self.chat.record(counts).write
        if self.head is not None:
            found[HEAD_FILE] = self.head.of_support(states_support(self.support)).write
        return found

    def settings(self) -> dict[str, Any]:
        """All that changes the cached values, but for the data."""
        record = describe(self.teacher.tokenizer, max_length=self.max_length)
        return {
            "task": "lm",
            "codec": self.codec.settings,
            "support": self.support.settings,
            "teacher": identity(self.teacher, record.files_sha256),
            "packing": packing_settings(
                self.teacher.tokenizer,
                max_length=self.max_length,
                document_end="eos",
                version=self.packing,
            ),
            "max_length": self.max_length,
            **room_of(self.codec).settings(self.codec),
            **self.layers.settings(),
        }

    def about(self) -> dict[str, Any]:
        """What codec and maps cost and lose on the first documents, and how tables are stored."""
        loss = self.codec_loss
        found = self.alignment.about | ({} if loss is None else {"probe": loss.to_json()})
        found[TABLE] = None if self.embeddings is None else self.embeddings.facts()
        found |= self.measured_attention()
        return found if self.head is None else found | {"language_model_head": self.head.facts()}

    def samples(self, documents: Sequence[Document]) -> list[PackedSample]:
        """Packed, in the documents' order."""
        return self._pack(documents).samples

    def samples_of_shard(self, documents: Sequence[Document]) -> list[PackedSample]:
        """The log says how many documents go on in another sample."""
        packed = self._pack(documents)
        if packed.num_continued:
            logger.info(
                "%s of %s documents of this shard are longer than a sample: each goes on in the "
                "next one, without what stands before",
                f"{packed.num_continued:,}",
                f"{len(documents):,}",
            )
        if packed.num_begun:
            logger.warning(
                "%s of %s documents of this shard begin with the begin-of-text token themselves, "
                "as a chat template's text does: it is put before them once, not twice",
                f"{packed.num_begun:,}",
                f"{len(documents):,}",
            )
        if packed.num_unseen:
            logger.warning(
                "%s of %s documents of this shard have a space, at the beginning or behind a "
                "special token, that the tokenizer's own cannot be told from: students of other "
                "tokenizers read them without it",
                f"{packed.num_unseen:,}",
                f"{len(documents):,}",
            )
        return packed.samples

    def say(self, samples: Sequence[PackedSample], tap: LayerTap, on_batch: OnBatch) -> Said:
        """What the codec keeps of each position.

        Raises:
            UserError: if a single sample does not fit into memory, or a position's logits are no
                numbers or cannot be kept.
        """
        drawn_at = draws_of(self.codec, samples)

        def reduce(part: Slice) -> Reduced:
            reduced, _ = reduce_positions(
                self.codec,
                self.support,
                part.logits,
                part.next_ids,
                states=part.states,
                drawn_at=None if drawn_at is None else drawn_at[part.places.cpu().numpy()],
            )
            return reduced

        outputs = run_positions(
            self.teacher,
            samples,
            reduce,
            batch_tokens=self.batch_tokens,
            tap=tap,
            on_batch=on_batch,
        )
        return Said(
            fields=packed_fields(
                self.codec,
                samples,
                outputs.pieces,
                has_continues=self.packing > 1,
                at_counted=self.at_counted,
            ),
            num_halvings=outputs.num_halvings,
        )

    def listen(self, samples: Sequence[PackedSample], tap: LayerTap) -> None:
        """In one batch."""
        listen_to_packed(self.teacher, samples, tap)

    def lengths(self, sample: PackedSample) -> list[int]:
        """Of the pieces of its documents."""
        return [piece.num_tokens for piece in sample.pieces]

    def num_sharing(self, documents: Sequence[Document], samples: Sequence[PackedSample]) -> int:
        """All of them: samples hold several."""
        return len(documents)

    @cached_property
    def codec_loss(self) -> CodecLoss | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Bytes and reconstruction error on the first documents; None if they predict nothing.

        Raises:
            UserError: if states and head do not give the teacher's logits.
        """
        chosen, places = first_positions(self.measured_samples())
        if not len(places):
            return None
        with torch.inference_mode():
            states = final_states(
                self.teacher.model,
                [sample.input_ids for sample in chosen],
                [self.lengths(sample) for sample in chosen],
                batching=self.teacher.batching,
            )[torch.from_numpy(places).to(self.teacher.device)]
            logits = head_logits(self.teacher.model, states)
        drawn_at = draws_of(self.codec, chosen)
        return measure_codec(
            self.codec,
            self.support,
            Positions(
                logits=logits,
                next_ids=torch.full((len(logits),), NO_LABEL, device=logits.device),
                states=states,
                drawn_at=None if drawn_at is None else drawn_at[places],
            ),
            None if self.head is None else self.head.to(self.teacher.device),
        )

    @property
    def bytes_per_token(self) -> float:
        """Of all of a sample's fields but those of layers, by the heads that were measured."""
        counts = self.corpora["labeled"].chat_counts if self.at_counted else None
        return bytes_per_token(
            self.codec,
            None if self.codec_loss is None else self.codec_loss.num_ids,
            share=1.0 if counts is None else counts.share_learned,
        )

    @property
    def num_ids(self) -> int:
        """Of the support."""
        return self.support.size

    def _pack(self, documents: Sequence[Document]) -> Packed:
        packed = pack(
            documents,
            self.teacher.tokenizer,
            max_length=self.max_length,
            version=self.packing,
        )
        self.teacher.require_rows([sample.input_ids for sample in packed.samples])
        known = self.support.teacher.size
        largest = max((int(one.input_ids.max()) for one in packed.samples), default=0)
        if largest >= known:
            raise CheckFailed(
                f"the text holds id {largest:,}, and the ids that are cached end at {known:,}: use "
                "--align map or none, which keep all of the teacher's"
            )
        return packed


def _rendered(
    config: ChatConfig,
    corpora: Mapping[str, Corpus],
    teacher: LanguageModelTeacher,
    max_length: int,
) -> tuple[ChatReading | None, Mapping[str, Corpus]]:
    """How conversations are read, and the corpora with theirs as texts.

    Raises:
        UserError: if some cannot be used, or there are none to which the options belong.
    """
    chats = [split for split, corpus in corpora.items() if corpus.chat_columns is not None]
    if len(chats) < len(corpora):
        texts = next(one for split, one in corpora.items() if split not in chats)
        if chats:
            raise UserError(
                f"{texts.config.source} holds texts and the other corpus conversations: cache them "
                "apart"
            )
        refuse_without_conversations(
            config, texts.config.source, str(texts.identity["text_column"])
        )
        return None, corpora
    generating: Any = teacher.model.generation_config
    reading = ChatReading.of(
        config,
        teacher.tokenizer,
        end_ids=listed_ids(generating.eos_token_id if generating is not None else None),
        max_length=max_length,
    )
    return reading, {split: corpus.rendered(reading) for split, corpus in corpora.items()}


def _log_frame(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say what stands around a text, and which begin of the tokenizer's does not."""
    around = surroundings(tokenizer)
    before, after = (
        tokenizer.convert_ids_to_tokens(list(ids))
        for ids in (around.before, around.ends[0] if around.ends else ())
    )
    logger.info(
        "put before each piece of a document: %s; behind its end: %s",
        " ".join(before) or "nothing",
        " ".join(after) or "nothing",
    )
    begin = tokenizer.bos_token
    if begin is not None and begin not in before:
        asked = tokenizer.init_kwargs.get("add_bos_token")
        logger.log(
            logging.WARNING if asked else logging.INFO,
            "the tokenizer has the begin token %s and puts it nowhere%s: no document begins with "
            "it",
            begin,
            ", though its files ask for it (add_bos_token)" if asked else "",
        )


class PositionsApart:
    """How far cached distributions are from a teacher's; a `Comparison`.

    Args:
        teacher: the one that made the cache.
        codec: opened, on the teacher's device.
        support: of the cache.
    """

    def __init__(self, teacher: LanguageModelTeacher, codec: Codec, support: AnySupport):
        self._teacher = teacher
        self._codec = codec
        self._support = support
        (self._temperature, *_) = measured_temperatures(codec)
        self._kl = self._log_prob = 0.0

    def compare(self, samples: Sequence[StoredSample], tap_of: TapOf) -> None:
        """A sample at a time: rows of one codec can differ in width.

        Each document alone, which is what its values stand for, however they were cached.
        """
        for sample in samples:
            apart = partial(self._apart, sample=sample, rows=rows_of(self._codec, sample))
            outputs = run_positions(
                self._teacher,
                [_packed(sample)],
                apart,
                batch_tokens=VERIFIED_BATCH_TOKENS,
                batching=ALONE,
                tap=tap_of([sample]),
            )
            kl, log_prob = np.concatenate(outputs.pieces[0]).max(axis=0)
            self._kl = float(np.maximum(self._kl, kl))  # a NaN stays one
            self._log_prob = float(np.maximum(self._log_prob, log_prob))

    def require_close(self, cache: Path, dtype: str) -> float:
        """The largest KL of a position, nats.

        Raises:
            CheckFailed: naming the distances and the tolerances.
        """
        if not (self._kl <= KL_TOLERANCE[dtype] and self._log_prob <= LOG_PROB_TOLERANCE[dtype]):
            raise CheckFailed(
                f"the teacher's distributions differ by up to {self._kl:.2g} nats, and its next "
                f"tokens' log-probs by {self._log_prob:.2g}, from those in {cache}, expected at "
                f"most {KL_TOLERANCE[dtype]} and {LOG_PROB_TOLERANCE[dtype]}: make the cache again "
                "with --overwrite"
            )
        return self._kl

    def _apart(
        self, part: Slice, sample: StoredSample, rows: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """[n, 2] KL, and how far the next token's log-prob is off beyond its rounding."""
        where = part.places.cpu().numpy()
        stored = {
            name: torch.from_numpy(one[where]).to(self._teacher.device)
            for name, one in rows.items()
        }
        exact, unmatched = self._support.log_probs(part.logits, self._temperature)
        kl, _ = kl_to_decoded(exact, unmatched, self._codec.decode(stored, self._temperature))
        log_probs, _ = self._support.teacher.log_probs(part.logits, 1.0)
        has_next = part.next_ids != NO_LABEL
        taken = part.next_ids.where(has_next, 0)
        again = log_probs.gather(1, taken[:, None])[:, 0].where(has_next, 0.0)
        cached = rows[NEXT_LOG_PROB].astype(np.float64)[where]
        off = np.abs(again.cpu().numpy() - cached) - HALF_STEP * np.abs(cached)
        return np.stack([kl, np.maximum(off, 0.0)], axis=1)


def _packed(sample: StoredSample) -> PackedSample:
    """The sample as the teacher saw it; of which documents it is, does not matter here."""
    lengths = np.bincount(sample["segment"])
    is_learned = None if has_rows(sample).all() else np.roll(sample["loss_mask"], 1)
    return PackedSample(
        input_ids=sample["input_ids"],
        segment=sample["segment"],
        pieces=tuple(Piece(document_id=b"", start=0, stop=int(length)) for length in lengths),
        is_learned=is_learned,
    )


def bytes_per_token(codec: Codec, num_ids: float | None = None, *, share: float = 1.0) -> float:
    """Stored bytes of a position, the token itself included.

    Args:
        codec: of the cache.
        num_ids: mean stored ids of a position, where that differs; the most, where not given.
        share: of the positions at which a distribution is kept.
    """
    tokens = bytes_per_position(language_model_schema((), is_packed=True))
    return tokens + share * codec.bytes_per_token(num_ids)
