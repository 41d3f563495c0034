"""Where a run's learned projection begins: by the tokens' strings, or by two embedding tables."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.join.learned_projection import LearnedProjection
from teacher_cache.stages.join.projection_candidates import Candidates
from teacher_cache.stages.tokens.record import id_to_string
from teacher_cache.stages.tokens.tokenizers import could_not_load, is_local_only, load_tokenizer

OPTION = "--projection-embeddings"


@dataclass(frozen=True, kw_only=True)
class ProjectionStart:
    """The rows before the first step.

    Attributes:
        fixed: of the map.
        learned: where the learned rows begin.
    """

    fixed: Candidates
    learned: Candidates

    @property
    def sha256(self) -> str:
        """Of the learned rows, which a run's settings record."""
        parts = (self.learned.student_ids, self.learned.weights)
        return hashlib.sha256(b"".join(one.numpy().tobytes() for one in parts)).hexdigest()

    def projection(self) -> LearnedProjection:
        """A fresh projection."""
        return LearnedProjection(self.fixed, self.learned)


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
