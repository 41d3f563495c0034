"""Stage two's task of a language model's cache: a distribution at each position of packed text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.named import AnyCodec, codec_from
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Ragged
from teacher_cache.stages.codecs.named import require_temperature, serves
from teacher_cache.stages.join.alignment import Alignment, require_known_ids
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.models.head import read_language_model_head
from teacher_cache.stages.student.build import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.packed_language_model import PackedLanguageModel
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.pretrained import identity, refuse_too_long
from teacher_cache.stages.student.pretrained_language_model import pretrained_language_model
from teacher_cache.stages.teacher.tables import TABLE_FILE, read_embedding_table
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.training.alignment import AlignedStudents
from teacher_cache.stages.training.auxiliaries import StudentWithProjection, with_projected_layers
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.config import ArchitectureConfig, TrainStudentConfig
from teacher_cache.stages.training.data import TrainingData, ordered_data
from teacher_cache.stages.training.language_model_trainer import LanguageModelTrainer
from teacher_cache.stages.training.measures import OBJECTIVE, Measure
from teacher_cache.stages.training.start import StartingStudent, filler_id, take_embeddings

logger = logging.getLogger(__name__)

# Each with the value at which it does nothing; None where it always does something.
CLASSIFIERS_OPTIONS: dict[str, Any] = {
    "pooling": None,
    "head": None,
    "dropout": None,
    "bidirectional": False,
    "lm_weight": 0.0,
    "pooled_weight": 0.0,
    "unlabeled_from": "all",
}
ENDS = ("bos", "eos")  # what generation begins and stops with
SHAPE = set(ArchitectureConfig.model_fields) - CLASSIFIERS_OPTIONS.keys()


class LanguageModelStudents:
    """A `StudentTask`.

    Raises:
        UserError: for a classifier's options, or a temperature or layers that the cache does not
            serve.
    """

    def __init__(self, config: TrainStudentConfig, readers: Sequence[CacheReader]):
        _refuse_other_tasks_options(config)
        self._config = config
        self._readers = readers
        self._trained: MambaStudentForCausalLM | PackedLanguageModel
        self._codec = codec_from(readers[0].manifest.settings["codec"])
        require_temperature(self._codec, config.temperature)
        self._layers = CachedLayers.of(config, readers[0])

    @property
    def label_names(self) -> list[str]:
        """The next tokens."""
        return ["next_ids"]

    @property
    def measure(self) -> Measure:
        """What is trained on, at the held-out positions: cross-entropy and KL as weighed."""
        return OBJECTIVE

    def data(self, joined: Joined) -> TrainingData:
        """Packed sequences, and their order."""
        assert joined.alignment is not None, "the join aligns a language model's cache"
        self._support = _support(self._readers[0], joined.alignment)
        self._aligned = AlignedStudents(
            alignment=joined.alignment, support_size=self._support.size, config=self._config
        )
        if self._layers is not None:
            self._aligned.require_same_positions(self._config.cache)
        if joined.alignment.kind == "truncate":
            require_known_ids(joined.alignment, max(map(_largest_id, self._readers)))
        self._say_if_coarse(joined.alignment)
        return ordered_data(self._config, self._readers, self._aligned.samples)

    def _say_if_coarse(self, alignment: Alignment) -> None:
        if not isinstance(self._codec, SampledCodec):
            return
        by = "--align projection" if alignment.kind == "projection" else None
        if self._config.divergence != "kl":
            by = f"--divergence {self._config.divergence}"
        if by is not None:
            logger.info(
                "the teacher is coarse: %s takes the drawn ids with their exact probabilities, and "
                "one outcome for all others; the counts serve the forward KL alone",
                by,
            )

    def start(self, joined: Joined) -> StartingStudent:
        """A Mamba with fresh weights, or a pre-trained causal language model."""
        if isinstance(self._codec, HiddenCodec):
            reader = self._readers[0]
            head = read_language_model_head(reader.cache, reader.manifest)
            self._codec = replace(self._codec, head=head.of_support(self._support))
        self._projection_start = self._aligned.projection_start(self._teacher_table())
        if self._config.pretrained is not None:
            return self._pretrained(self._config.pretrained, joined)
        return self._mamba(joined)

    def _mamba(self, joined: Joined) -> StartingStudent:
        """One whose table has the ids of the tokenizer."""
        tokenizer = joined.tokenizer
        shape = self._config.model_dump(include=SHAPE)
        if self._config.arch == "mamba":
            del shape["head_dim"]
        pad_id = filler_id(tokenizer)
        student_config = MambaStudentConfig(
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            **(shape | {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ENDS}),
            pad_token_id=pad_id,
        )
        model = build_language_model(student_config, seed=self._config.seed)
        self._trained = model
        random = self._config.embeddings == "random"
        if not random and self._aligned.alignment.kind != "same":
            raise UserError(
                f"--embeddings {self._config.embeddings} needs the teacher's ids, and the student "
                "has others: leave the option out"
            )
        taken = {} if random else take_embeddings(model, self._config, joined)
        return StartingStudent(
            model=model,
            pad_id=pad_id,
            settings={"task": "lm"} | shape | taken | self._of_the_projection(),
            about={},
        )

    def _pretrained(self, name: str, joined: Joined) -> StartingStudent:
        """Its own weights, and its own way of keeping packed documents apart."""
        loaded = pretrained_language_model(name, tokenizer=joined.tokenizer, seed=self._config.seed)
        longest = max(int(reader.lengths().max()) for reader in self._readers)
        refuse_too_long(name, loaded.model, longest_sample=longest, max_length=joined.max_length)
        self._trained = PackedLanguageModel(loaded.model, packs=loaded.packs)
        return StartingStudent(
            model=loaded.model,
            pad_id=filler_id(joined.tokenizer),
            settings={"task": "lm", "arch": "hf", "start": identity(loaded.model)}
            | self._of_the_projection(),
            about={"start": self._config.arch, "packs": loaded.packs},
        )

    def trainer(
        self,
        student: StartingStudent,
        data: TrainingData,
        *,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ) -> LanguageModelTrainer:
        """On the positions that count."""
        aligned, start, trained = self._aligned, self._projection_start, self._trained
        vocab_size = len(trained.output_head.weight)
        fixed_map = aligned.fixed_map(vocab_size)
        keeps_ids = fixed_map is None and not aligned.alignment.rereads
        transfer = None
        if self._layers is not None:
            self._layers.say()
            transfer = self._layers.transfer(position_map=PositionMap(), num_steps=data.num_steps)
        return aligned.trainer_type()(
            model=with_projected_layers(trained, self._layers)
            if start is None
            else StudentWithProjection(trained, start.projection()),
            args=args,
            objective=self._config,
            embedding_lr_scale=self._config.embedding_lr_scale,
            transfer=transfer,
            codec=_on_device(self._codec, args.device),
            support=_mask(self._support, vocab_size) if keeps_ids else aligned.support(vocab_size),
            fixed_map=fixed_map,
            held_out_temperature=1.0 if serves(self._codec, 1.0) else self._config.temperature,
            batches=data.batches,
            train_dataset=data.training,
            eval_dataset=data.evaluation,
            data_collator=aligned.collator(student.pad_id, self._codec, self._layers),
            callbacks=callbacks,
            **aligned.trainer_arguments(data.num_steps),
        )

    def _teacher_table(self) -> Tensor | None:
        """The teacher's input embeddings, else its head, where the cache holds one of them."""
        reader = self._readers[0]
        if TABLE_FILE in reader.manifest.teacher_files:
            return read_embedding_table(reader.cache, reader.manifest)[: self._support.size]
        head: Any = self._codec.head if isinstance(self._codec, HiddenCodec) else None
        return None if head is None else head.weight

    def _of_the_projection(self) -> dict[str, Any]:
        """What a run's settings record of where a learned projection begins."""
        start = self._projection_start
        return {} if start is None else {"projection_sha256": start.sha256}

    def write_files(self, folder: Path, trained: torch.nn.Module) -> None:
        """Those of the alignment."""
        self._aligned.write_files(folder, trained)


def _refuse_other_tasks_options(config: TrainStudentConfig) -> None:
    given = [
        name
        for name, off in CLASSIFIERS_OPTIONS.items()
        if name in config.model_fields_set and getattr(config, name) not in (off, None)
    ]
    if config.embeddings == "teacher-states":  # pooled, which a language model's are not
        given.append("embeddings teacher-states")
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"{config.cache} is of a language model, and only a classifier's training takes "
            f"{options}: leave that out"
        )


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


def _on_device(codec: AnyCodec, device: torch.device) -> AnyCodec:
    """The codec with its head, if it decodes through one, where it decodes."""
    if not isinstance(codec, HiddenCodec):
        return codec
    head: Any = codec.head
    return replace(codec, head=head.to(device))
