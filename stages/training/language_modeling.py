"""Stage two's task of a language model's cache: a distribution at each position of packed text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Ragged
from teacher_cache.stages.codecs.named import open_codec, require_temperature, room_of, serves
from teacher_cache.stages.join.alignment import Alignment, require_known_ids
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.models.pretrained import num_positions
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.pretrained import (
    PackedLanguageModel,
    identity,
    language_model_config,
    pretrained_language_model,
    refuse_too_long,
)
from teacher_cache.stages.teacher.tables import TABLE_FILE, read_embedding_table
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.training.alignment import AlignedStudents
from teacher_cache.stages.training.auxiliaries import (
    Auxiliary,
    with_auxiliaries,
    write_projection,
)
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.copied_teacher import teacher_to_copy
from teacher_cache.stages.training.data import ordered_data
from teacher_cache.stages.training.held_out import HeldOutTokens
from teacher_cache.stages.training.layers import Schedule
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.measures import OBJECTIVE, Measure
from teacher_cache.stages.training.start import StartingStudent, filler_id, take_embeddings
from teacher_cache.stages.training.targets import CachedTeacher, ProjectedTeacher
from teacher_cache.stages.training.task import Course, StudentTask
from teacher_cache.stages.training.terms import Chunks, Term, weighed
from teacher_cache.stages.training.views import TargetsOf, TokensView
from teacher_cache.stages.training.vocabulary_projection import LearnedProjection

logger = logging.getLogger(__name__)

ENDS = ("bos", "eos")  # what generation begins and stops with


class LanguageModelStudents(StudentTask):
    """Distributions at positions.

    Raises:
        UserError: for a temperature or layers that the cache does not serve.
    """

    name = "lm"

    def __init__(self, config: TrainStudentConfig, readers: Sequence[CacheReader]):
        super().__init__(config, readers)
        self._codec = codec_from(readers[0].manifest.settings["codec"])
        require_temperature(self._codec, config.objective.temperature)
        self._start = teacher_to_copy(config.student, readers[0])
        architecture = config.student if self._start is None else self._start.architecture
        self._layers = CachedLayers.of(config.transfer, architecture, readers[0])

    @classmethod
    def described(cls, name: str) -> PreTrainedConfig:
        """A causal language model's."""
        return language_model_config(name)

    @property
    def measure(self) -> Measure:
        """What is trained on, at the held-out positions: cross-entropy and KL as weighed."""
        return OBJECTIVE

    def course(self, joined: Joined) -> Course:
        """Packed sequences, and a Mamba with fresh weights or a pre-trained language model."""
        alignment = joined.alignment
        assert alignment is not None, "the join aligns a language model's cache"
        support = _support(self._readers[0], alignment)
        aligned = AlignedStudents(
            alignment=alignment, support_size=support.size, config=self._config.projection
        )
        if self._layers is not None:
            aligned.require_same_positions(self._readers[0].cache)
        if alignment.kind == "truncate":
            require_known_ids(alignment, max(map(_largest_id, self._readers)))
        self._say_if_coarse(alignment)
        objective = self._config.objective
        data = ordered_data(
            self._config.training,
            self._readers,
            aligned.samples,
            unlabeled_alpha=objective.unlabeled_alpha,
        )
        codec = open_codec(self._readers[0], support=support)
        projection = aligned.projection(self._teacher_table(codec, support))
        student, packed = self._student(joined, projection)
        chunks = Chunks(objective=objective) if alignment.kind == "spans" else None
        taught = _Taught(
            aligned=aligned,
            support=support,
            codec=codec,
            projection=projection,
            vocab_size=len(packed.output_head.weight),
        )

        def lesson(device: torch.device) -> Lesson:
            return Lesson(
                view=taught.view(device, data.num_steps),
                objective=objective,
                terms=[
                    *([] if chunks is None else [chunks]),
                    *weighed(objective),
                    *self._matched_layers(),
                ],
                schedule=Schedule.of(self._config.transfer, data.num_steps),
            )

        return Course(
            data=data,
            student=student,
            trained=with_auxiliaries(packed, *self._auxiliaries(student, projection)),
            lesson=lesson,
            held_out=HeldOutTokens(
                objective,
                temperature=1.0 if serves(codec, 1.0) else objective.temperature,
                has_bytes=alignment.rereads,
                chunks=chunks,
            ),
            collator=aligned.collator(student.pad_id, codec, self._layers),
            max_length=num_positions(student.model),
            write_files=taught.write_files,
        )

    def _auxiliaries(
        self, student: StartingStudent, projection: LearnedProjection | None
    ) -> list[Auxiliary]:
        """Projections of the teacher's ids, and of layers where the teacher's are matched."""
        found: list[Auxiliary] = [] if projection is None else [projection]
        if self._layers is not None:
            seed = self._config.training.seed
            found += self._layers.projections(student.model.config.d_model, seed=seed)
        return found

    def _matched_layers(self) -> list[Term]:
        if self._layers is None:
            return []
        self._layers.say()
        return self._layers.terms(PositionMap())

    def _say_if_coarse(self, alignment: Alignment) -> None:
        sentence = room_of(self._codec).coarse_for(
            divergence=self._config.objective.divergence,
            is_projected=alignment.kind == "projection",
        )
        if sentence is not None:
            logger.info("%s", sentence)

    def _teacher_table(self, codec: Codec, support: Support) -> Tensor | None:
        """The teacher's input embeddings, else its head, where the cache holds one of them."""
        reader = self._readers[0]
        if TABLE_FILE in reader.manifest.teacher_files:
            return read_embedding_table(reader.cache, reader.manifest)[: support.size]
        return room_of(codec).head_weight(codec)

    def _student(
        self, joined: Joined, projection: LearnedProjection | None
    ) -> tuple[StartingStudent, MambaStudentForCausalLM | PackedLanguageModel]:
        """What becomes the result, and what of it runs on packed rows."""
        recorded = {} if projection is None else {"projection_sha256": projection.sha256}
        name = self._config.student.pretrained
        if name is not None:
            return self._pretrained(name, joined, recorded)
        student = self._mamba(joined, recorded)
        assert isinstance(student.model, MambaStudentForCausalLM), "as it was built"
        return student, student.model

    def _mamba(self, joined: Joined, recorded: dict[str, Any]) -> StartingStudent:
        """One whose table has the ids of the tokenizer."""
        tokenizer = joined.tokenizer
        start = self._start
        shape = self._config.student.shape(self.name) if start is None else start.shape
        pad_id = filler_id(tokenizer)
        student_config = MambaStudentConfig(
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            **(shape | {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ENDS}),
            pad_token_id=pad_id,
        )
        config = self._config.training
        model = build_language_model(student_config, seed=config.seed)
        random = config.embeddings == "random"
        assert joined.alignment is not None, "the join aligns a language model's cache"
        if not random and joined.alignment.kind != "same":
            raise UserError(
                f"--embeddings {config.embeddings} needs the teacher's ids, and the student "
                "has others: leave the option out"
            )
        taken = {} if random else take_embeddings(model, config, joined)
        if start is not None:
            start.copy_into(model, is_same=joined.alignment.kind == "same")
            taken |= start.settings
        return StartingStudent(
            model=model,
            pad_id=pad_id,
            settings={"task": self.name} | shape | taken | recorded,
            about={},
        )

    def _pretrained(
        self, name: str, joined: Joined, recorded: dict[str, Any]
    ) -> tuple[StartingStudent, PackedLanguageModel]:
        """Its own weights, and its own way of keeping packed documents apart."""
        loaded = pretrained_language_model(
            name,
            tokenizer=joined.tokenizer,
            max_length=joined.max_length,
            seed=self._config.training.seed,
        )
        longest = max(int(reader.lengths().max()) for reader in self._readers)
        refuse_too_long(name, loaded.model, longest_sample=longest, max_length=joined.max_length)
        student = StartingStudent(
            model=loaded.model,
            pad_id=filler_id(joined.tokenizer),
            settings={"task": self.name, "arch": "hf", "start": identity(loaded.model)} | recorded,
            about={
                "start": self._config.student.arch,
                "packs": loaded.batching.rows == "packed",
            },
        )
        return student, PackedLanguageModel(loaded.model, batching=loaded.batching)


@dataclass(frozen=True, kw_only=True)
class _Taught:
    """The teacher as a student of V outcomes learns from it.

    Attributes:
        aligned: the two tokenizers.
        support: of the cached distributions.
        codec: that decodes them.
        projection: that learns beside the student; None where none does.
        vocab_size: V.
    """

    aligned: AlignedStudents
    support: Support
    codec: Codec
    projection: LearnedProjection | None
    vocab_size: int

    def view(self, device: torch.device, num_steps: int) -> TokensView:
        """The counted positions, through the alignment's map."""
        fixed = self.aligned.fixed_map(self.vocab_size)
        keeps_ids = fixed is None and not self.aligned.alignment.rereads
        support = (
            _mask(self.support, self.vocab_size)
            if keeps_ids
            else self.aligned.support(self.vocab_size)
        )
        cached = CachedTeacher(
            codec=room_of(self.codec).to(self.codec, device),
            fixed=None if fixed is None else fixed.to(device),
        )
        teacher: TargetsOf = cached
        if self.projection is not None:
            between = self.aligned.projection_steps(num_steps)
            teacher = ProjectedTeacher(fixed=cached, projection=self.projection, between=between)
        return TokensView(cached.codec, teacher, None if support is None else support.to(device))

    def write_files(self, folder: Path) -> None:
        """The map and what was learned of it, beside the student.

        Raises:
            UserError: where the file system refuses.
        """
        self.aligned.write_map(folder)
        if self.projection is not None:
            write_projection(folder, self.projection)


def _support(reader: CacheReader, alignment: Alignment) -> Support:
    """The ids that the cached distributions are over.

    Raises:
        UserError: if they are not those of the tokenizer that they should be.
    """
    recorded = reader.manifest.settings["support"]
    is_captured = alignment.captured is not None
    tokenizer = alignment.student if is_captured else alignment.teacher
    support = Support.of_tokenizer(tokenizer, recorded["size"])
    if not is_captured and support.settings != recorded:
        raise UserError(
            f"{reader.cache} holds distributions over {recorded['size']:,} ids of kind "
            f"{recorded['kind']!r}, which are not the ids of its tokenizer: make the cache again "
            "with the teacher's own tokenizer"
        )
    return support


def _largest_id(reader: CacheReader) -> int:
    """Among the cached tokens."""
    ids = (fields["input_ids"] for fields in reader.batches())
    return max(int(one.values.max(initial=0)) for one in ids if isinstance(one, Ragged))


def _mask(support: Support, vocab_size: int) -> Tensor | None:
    """[V] bool of the student's table; None where all of it counts."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[: support.size] = True
    mask[list(support.unused)] = False
    return None if bool(mask.all()) else mask
