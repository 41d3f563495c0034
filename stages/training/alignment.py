"""What a language model's training takes from its alignment: samples, batches, trainer, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.join.alignment import Alignment
from teacher_cache.stages.join.config import ProjectionConfig
from teacher_cache.stages.tokens.record import id_to_string
from teacher_cache.stages.tokens.tokenizers import could_not_load, is_local_only, load_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import write_map
from teacher_cache.stages.training.batches import (
    AlignedCollator,
    AlignedSamples,
    CachedSamples,
    PackedCollator,
    PackedSamples,
)
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.targets import FixedMap
from teacher_cache.stages.training.vocabulary_projection import (
    LearnedProjection,
    candidates_by_embeddings,
    candidates_by_strings,
    candidates_of_map,
)

OPTION = "--projection-embeddings"


def student_embeddings(name: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The input embeddings [V_s, D] of a language model of the student's tokenizer.

    Args:
        name: hub id or folder.
        tokenizer: the student's.

    Raises:
        UserError: if it cannot be loaded, or has fewer rows than the tokenizer ids.
        CheckFailed: if its ids mean other strings than the student's.
    """
    if id_to_string(load_tokenizer(name, option=OPTION)) != id_to_string(tokenizer):
        raise CheckFailed(
            f"the ids of {name} are not those of the student's tokenizer, so its embeddings say "
            f"nothing of them: give {OPTION} a model of that tokenizer"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, local_files_only=is_local_only(name), dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(could_not_load("language model", name, error, option=OPTION)) from error
    rows = model.get_input_embeddings().weight.detach()
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if len(rows) < num_ids:
        raise UserError(
            f"{name} has {len(rows):,} embeddings for its tokenizer's {num_ids:,} ids: give "
            f"{OPTION} another model"
        )
    return rows[:num_ids]


def require_teacher_table(table: Tensor | None) -> Tensor:
    """The teacher's side of an attention over two tables.

    Raises:
        UserError: where the cache holds none.
    """
    if table is None:
        raise UserError(
            f"{OPTION} needs the teacher's embeddings, too, and the cache holds none: run the same "
            "`pipe cache-teacher` again, it adds them, or leave the option out"
        )
    return table.float()


@dataclass(frozen=True, kw_only=True)
class AlignedStudents:
    """How one alignment trains.

    Attributes:
        alignment: of the join.
        support_size: ids V_t of the cached distributions.
        config: of the learned projection.
    """

    alignment: Alignment
    support_size: int
    config: ProjectionConfig

    @property
    def samples(self) -> Callable[..., CachedSamples]:
        """What makes the samples of a split: as they are, or with their text read again."""
        if not self.alignment.rereads:
            return PackedSamples
        is_spans = self.alignment.kind == "spans"
        return partial(AlignedSamples, aligner=self.alignment.aligner, is_spans=is_spans)

    def collator(
        self, pad_id: int, codec: Codec, layers: CachedLayers | None
    ) -> AlignedCollator | PackedCollator:
        """What stacks them; the teacher's layers, too, where they are matched."""
        if self.alignment.rereads:
            return AlignedCollator(pad_id, codec)
        return PackedCollator(pad_id, codec, layers)

    def require_same_positions(self, cache: Path | None) -> None:
        """Refuse to match the teacher's layers at positions that the student does not have.

        Raises:
            UserError: if the student reads the text with its own tokenizer.
        """
        if self.alignment.rereads:
            raise UserError(
                f"the student reads the text of {cache} with its own tokenizer, and the teacher's "
                "maps and states are of other positions: leave out --attention-weight and "
                "--hidden-weight"
            )

    def fixed_map(self, vocab_size: int) -> FixedMap | None:
        """From the cached ids to the V of the student's; None where they are the same.

        Args:
            vocab_size: V, rows of the student's head.
        """
        alignment = self.alignment
        if alignment.head_ids is None:
            return None
        student_ids = alignment.head_ids[: self.support_size]
        captured = alignment.captured
        of_teacher = student_ids if captured is None else captured.student_ids
        reached = torch.zeros(vocab_size, dtype=torch.bool)
        reached[of_teacher[of_teacher >= 0]] = True
        return FixedMap(student_ids=torch.from_numpy(student_ids.copy()), reached=reached)

    def support(self, vocab_size: int) -> Tensor:
        """[V] bool, the ids of the student's tokenizer."""
        used = torch.zeros(vocab_size, dtype=torch.bool)
        used[list(self.alignment.student.get_vocab().values())] = True
        return used

    def projection(self, teacher_table: Tensor | None) -> LearnedProjection | None:
        """The learned projection before its first step; None where none is learned.

        Args:
            teacher_table: [V_t, D] of the teacher's head, where the cache holds it.

        Raises:
            UserError: if embeddings are to say it and are not there.
            CheckFailed: if they are another tokenizer's.
        """
        if self.alignment.kind != "projection":
            return None
        exact = self.alignment.vocabulary_map
        cut = replace(exact, student_ids=exact.student_ids[: self.support_size])
        num, name = self.config.projection_candidates, self.config.projection_embeddings
        if name is not None:
            if not cut.num_mapped:
                raise UserError(
                    "the two vocabularies share no string, so nothing relates their embeddings: "
                    "leave --projection-embeddings out"
                )
            learned = candidates_by_embeddings(
                require_teacher_table(teacher_table),
                student_embeddings(name, self.alignment.student),
                cut,
                num_candidates=num,
            )
        else:
            teacher, theirs = self.alignment.tables
            ours = replace(teacher, content=teacher.content[: self.support_size])
            learned = candidates_by_strings(ours, theirs, cut, num_candidates=num)
        return LearnedProjection(candidates_of_map(cut), learned)

    def projection_steps(self, num_steps: int) -> tuple[int, int]:
        """Between which steps of a training the fixed map passes into the learned projection."""
        start, end = self.config.projection_start, self.config.projection_end
        return round(start * num_steps), round(end * num_steps)

    def write_map(self, folder: Path) -> None:
        """The map, beside the student.

        Raises:
            UserError: where the file system refuses.
        """
        if self.alignment.rereads:
            write_map(folder, self.alignment.vocabulary_map)
