"""Models ready to be evaluated, from a teacher's folder or a student's run: one way for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import teacher_cache.stages.student  # noqa: F401  (registers the student with the AutoClasses)
from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.tokenization import Sample, tokenize
from teacher_cache.stages.evaluation.runs import finished_student, known_task, pair_of
from teacher_cache.stages.heads import HEADS, SINGLE, Head, HeadName, possible_heads
from teacher_cache.stages.models.batching import Batching
from teacher_cache.stages.models.causal import (
    final_states,
    head_logits,
    language_model_batching,
)
from teacher_cache.stages.models.device import (
    recurrences_by_device,
    resolve_device,
    resolve_dtype,
)
from teacher_cache.stages.models.inference import class_logits, classifier_batching
from teacher_cache.stages.models.pretrained import (
    class_names,
    num_positions,
    on_device,
    reads_token_types,
    require_rows,
)
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.tasks import TASKS, TaskName
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import load_language_model, load_teacher
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.tokens.tokenizers import load_tokenizer
from teacher_cache.stages.training.run_folder import RunRecord

TEACHER = "teacher"  # what a table calls it


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(ABC):
    """A model with all it needs to read text; each kind says what its models have besides.

    Attributes:
        task: what models of this kind do.
        auto: the class of transformers that loads one.
        name: what a table calls it.
        model: in evaluation mode, on its device.
        tokenizer: its own.
        max_length: tokens of the longest sample that it is given.
        batching: which samples share a pass, as measured.
        autocast: number format of the products of a student, whose weights stay float32; a
            teacher's weights are in its format themselves.
        pair: columns of the two texts that a student has learned to read as one document; None of
            single texts, and of a teacher, whose runs say it.
    """

    task: ClassVar[TaskName]
    auto: ClassVar[Any]

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    max_length: int
    batching: Batching
    autocast: torch.dtype = torch.float32
    pair: tuple[str, ...] | None = None

    @classmethod
    def of_run(cls, run: Path, config: DeviceConfig) -> Self:
        """Load a finished run's student.

        Raises:
            UserError: if the folder is no run, its training has not ended, its model is damaged or
                of another kind.
        """
        record = finished_student(run)
        found = known_task([run])
        if found.name != cls.task:
            raise UserError(f"{run} is {found.kind}: give {TASKS[cls.task].kind}'s run")
        device = resolve_device(config)
        model = _load_model(run, cls.auto)
        tokenizer = load_tokenizer(str(run.resolve()), option="RUN")
        max_length = record.about["max_length"]
        own = cls._of_student(str(run), model.eval(), tokenizer, record)
        return cls(
            name=run.name,
            model=on_device(model, device),
            tokenizer=tokenizer,
            max_length=max_length,
            autocast=resolve_dtype(config, device),
            **own,
        )

    @classmethod
    def of_teacher(cls, config: TeacherConfig) -> Self:
        """Load a teacher as a model among others.

        Raises:
            UserError: as the teacher's own loading.
        """
        teacher, own = cls._loaded_teacher(config)
        return cls(
            name=TEACHER,
            model=teacher.model,
            tokenizer=teacher.tokenizer,
            max_length=teacher.max_length(config.max_length),
            batching=teacher.batching,
            **own,
        )

    @classmethod
    @abstractmethod
    def _of_student(
        cls, where: str, model: PreTrainedModel, tokenizer: Tokenizer, record: RunRecord
    ) -> dict[str, Any]:
        """Its batching, and what this kind has besides, of a student just loaded."""

    @classmethod
    @abstractmethod
    def _loaded_teacher(cls, config: TeacherConfig) -> tuple[Any, dict[str, Any]]:
        """A teacher, and what this kind has besides."""

    @property
    def num_parameters(self) -> int:
        """Parameters, embeddings included, each counted once.

        A head in float32 beside embeddings in half precision is a copy of theirs (`on_device`).
        """
        counted = sum(parameter.numel() for parameter in self.model.parameters())
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        is_tied = getattr(self.model.config, "tie_word_embeddings", False)
        if is_tied and isinstance(head, nn.Linear) and isinstance(table, nn.Embedding):
            counted -= head.weight.numel() if head.weight is not table.weight else 0
        return counted

    @property
    def num_positions(self) -> float:
        """The longest sample that the model can read at all; no bound for a Mamba student."""
        return num_positions(self.model) or float("inf")

    @property
    def megabytes(self) -> float:
        """Memory of the parameters in their number format, in 10**6 bytes."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 1e6


def _load_model(run: Path, auto: Any) -> PreTrainedModel:
    try:
        model = auto.from_pretrained(str(run.resolve()), dtype=torch.float32)
        return recurrences_by_device(model)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the model in {run} cannot be loaded ({first_line(error)}): its files are damaged or "
            "of another version; train it again with --resume never"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Classifier(EvaluatedModel):
    """A sequence classifier; documents are cut at its `max_length`.

    Attributes:
        pad_id: fills batches; masked.
        id2label: class names by id.
        heads: the kinds of head that it may have: one of a student.
    """

    task = "classification"
    auto = AutoModelForSequenceClassification

    pad_id: int
    id2label: dict[int, str]
    heads: tuple[HeadName, ...] = (SINGLE.name,)

    @property
    def head(self) -> Head:
        """What a student's outputs mean."""
        return HEADS[self.heads[0]]

    @classmethod
    def _of_student(
        cls, where: str, model: PreTrainedModel, tokenizer: Tokenizer, record: RunRecord
    ) -> dict[str, Any]:
        pad_id = model.config.pad_token_id or 0
        batching = Batching()
        if not isinstance(model, MambaStudentForSequenceClassification):
            batching = classifier_batching(
                where,
                model,
                tokenizer,
                pad_id=pad_id,
                max_length=record.about["max_length"],
                plain=batching,
            )
        return {
            "pad_id": pad_id,
            "id2label": class_names(model),
            "batching": batching,
            "pair": pair_of(record),
            "heads": possible_heads(where, model.config.problem_type, len(class_names(model)))[:1],
        }

    @classmethod
    def _loaded_teacher(cls, config: TeacherConfig) -> tuple[Any, dict[str, Any]]:
        teacher = load_teacher(config)
        return teacher, {
            "pad_id": teacher.pad_id,
            "id2label": teacher.id2label,
            "heads": teacher.heads,
        }

    def tokenize(self, documents: list[Document]) -> list[Sample]:
        """Samples of the documents that are not empty, in their order."""
        is_pair = any(document.second is not None for document in documents)
        samples = tokenize(
            documents,
            self.tokenizer,
            max_length=self.max_length,
            with_types=is_pair and reads_token_types(self.model, self.tokenizer),
        )
        ids = [sample.input_ids for sample in samples]
        require_rows(self.name, self.model, self.tokenizer, ids)
        return samples

    def logits(self, samples: list[Sample], *, batch_tokens: int) -> np.ndarray:
        """Class logits [N, C] float32, in the samples' order."""
        types = [sample.token_types for sample in samples if sample.token_types is not None]
        return class_logits(
            self.model,
            [sample.input_ids for sample in samples],
            num_classes=len(self.id2label),
            pad_id=self.pad_id,
            batching=self.batching,
            max_tokens=batch_tokens,
            autocast=self.autocast,
            token_types=types or None,
        ).logits


@dataclass(frozen=True, kw_only=True)
class LanguageModel(EvaluatedModel):
    """A causal language model; packed samples have at most its `max_length` tokens."""

    task = "lm"
    auto = AutoModelForCausalLM

    @classmethod
    def _of_student(
        cls, where: str, model: PreTrainedModel, tokenizer: Tokenizer, record: RunRecord
    ) -> dict[str, Any]:
        if isinstance(model, MambaStudentForCausalLM):
            # Each document is a row of its own, so that nothing of packing has to be trusted.
            return {"batching": Batching()}
        num_ids = max(tokenizer.get_vocab().values()) + 1
        return {
            "batching": language_model_batching(
                where, model, max_length=record.about["max_length"], num_ids=num_ids
            )
        }

    @classmethod
    def _loaded_teacher(cls, config: TeacherConfig) -> tuple[Any, dict[str, Any]]:
        return load_language_model(config), {}

    def states(self, sequences: Sequence[np.ndarray], lengths: Sequence[Sequence[int]]) -> Tensor:
        """What the head reads of every token, [N, D], the sequences end to end.

        Args:
            sequences: token ids, [S_i] each, N in all.
            lengths: of the documents of each, which nothing crosses.
        """
        require_rows(self.name, self.model, self.tokenizer, sequences)
        is_on = self.autocast is not torch.float32
        with torch.autocast(self.model.device.type, self.autocast, enabled=is_on):
            return final_states(self.model, sequences, lengths, batching=self.batching)

    def logits(self, states: Tensor) -> Tensor:
        """[n, V] float32 of some of its states [n, D]; the head computes in float32."""
        return head_logits(self.model, states.float())


@dataclass(frozen=True, kw_only=True)
class TeacherModel(LanguageModel):
    """A teacher.

    Attributes:
        support: the ids that its distributions are over.
    """

    support: Support

    @classmethod
    def _loaded_teacher(cls, config: TeacherConfig) -> tuple[Any, dict[str, Any]]:
        teacher = load_language_model(config)
        support = Support.of_tokenizer(teacher.tokenizer, teacher.num_logits)
        return teacher, {"support": support}
