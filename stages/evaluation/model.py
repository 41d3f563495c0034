"""A model under evaluation, of whatever task: what it is called, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.stages.teacher.load import num_positions

TEACHER = "teacher"  # what a table calls it


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model with all it needs to read text.

    Attributes:
        name: what a table calls it.
        model: in evaluation mode, on its device.
        tokenizer: its own.
        max_length: tokens of the longest sample that it is given.
        autocast: number format of the products of a student, whose weights stay float32; a
            teacher's weights are in its format themselves.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    max_length: int
    autocast: torch.dtype = torch.float32

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
