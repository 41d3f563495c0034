"""Any of transformers' causal language models on packed rows, across whose borders nothing looks.

What the teacher's side measures (`stages.models.causal`) holds for a student too: a model
that *packs* gets position ids that begin anew with each document, and no mask, from which
transformers makes masks of each layer's own kind; for any other model each document becomes a row
of its own. Here with gradients, and from batches as training makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.student.scans.unpacking import lay_end_to_end, plan_rows
from teacher_cache.stages.student.tied_weights import hold_tied_weights_once


@dataclass
class PackedStates(ModelOutput):
    """What the head reads.

    Attributes:
        final_states: [B, S, D].
        head: the head's parameters. A loss multiplies with them outside of this forward pass;
            data parallelism counts those as used that it sees among the outputs.
    """

    final_states: Tensor | None = None
    head: tuple[Tensor, ...] | None = None


class PackedLanguageModel(nn.Module):
    """What is trained of a pre-trained student: its base on packed rows, and its head.

    Its state has each tied weight once. Only `student` is the result.

    Args:
        student: to be trained; shared, not copied.
        packs: whether it runs several documents in one row.
    """

    def __init__(self, student: PreTrainedModel, *, packs: bool) -> None:
        super().__init__()
        self.student = student
        self._packs = packs
        hold_tied_weights_once(self)

    @property
    def output_head(self) -> LinearHead:
        """The student's head."""
        return LinearHead.of(self.student)

    def get_input_embeddings(self) -> nn.Module:
        """The student's."""
        return self.student.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        seq_idx: Tensor,
        use_cache: Literal[False] = False,
        states_only: Literal[True] = True,
    ) -> PackedStates:
        """Final states, each document's as if it stood alone.

        Args:
            input_ids: [B, S] integers, padded on the right.
            attention_mask: [B, S], nonzero at real tokens.
            seq_idx: [B, S] integers that number the documents of a row; a row's padding counts to
                its last document, which cannot see it.
            use_cache: training keeps no cache.
            states_only: logits are the loss's to compute.
        """
        run = self._packed if self._packs else self._row_a_document
        head = self.output_head
        parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
        return PackedStates(
            final_states=run(input_ids, attention_mask, seq_idx),
            head=tuple(one.view_as(one) for one in parameters),
        )

    def _packed(self, input_ids: Tensor, _: Tensor, seq_idx: Tensor) -> Tensor:
        base: Any = self.student.base_model
        output = base(input_ids=input_ids, position_ids=places(seq_idx), use_cache=False)
        return output.last_hidden_state

    def _row_a_document(self, input_ids: Tensor, attention_mask: Tensor, seq_idx: Tensor) -> Tensor:
        base: Any = self.student.base_model
        # Padding becomes a document of its own, so that no row is longer for it.
        plan = plan_rows(torch.where(attention_mask != 0, seq_idx, -1))
        if plan is None:
            return base(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        groups = []
        for group in plan.groups:
            mask = group.padding.logical_not().to(attention_mask.dtype)
            output = base(input_ids=group.rows_of(input_ids), attention_mask=mask, use_cache=False)
            groups.append(output.last_hidden_state)
        return lay_end_to_end(groups)[plan.places].unflatten(0, input_ids.shape)


def places(seq_idx: Tensor) -> Tensor:
    """Each token's place in its document, from 0: [B, S] int64.

    Args:
        seq_idx: [B, S] integers; a document begins wherever the value changes.
    """
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand(seq_idx.shape)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = torch.where(begins, position, 0).cummax(dim=1).values
    return position - starts
