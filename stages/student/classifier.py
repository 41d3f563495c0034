"""The Mamba student as a text classifier: backbone, pooling, head."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.backbone import MambaStudentModel, MambaStudentPreTrainedModel
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.heads import build_head
from teacher_cache.stages.student.position_map import PositionMap


class MambaStudentForSequenceClassification(MambaStudentPreTrainedModel):
    """A Mamba student with a classification head.

    Args:
        config: sizes, pooling, head and the position map, which `forward` applies.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        self.position_map = PositionMap.from_dict(config.position_map or {})
        self.backbone = MambaStudentModel(config)
        self.head = build_head(
            config.head,
            d_model=config.d_model,
            num_labels=cast(int, config.num_labels),  # transformers always sets it
            dropout=config.dropout,
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify a batch of samples of different lengths, padded on either side.

        Args:
            input_ids: [B, S] integers, in the tokenizer's order.
            attention_mask: [B, S], nonzero at real tokens; without one, every token is real,
                whatever `pad_token_id` says.
            labels: [B] class indices; with them the output holds the mean cross-entropy.
            token_type_ids: ignored: BERT's tokenizers emit them, the student has no segments.

        Returns:
            `logits` [B, C] float32, and `loss` where labels are given.

        Raises:
            UserError: if a sample has no tokens.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.bool()
        if not mask.any(dim=1).all():
            sample = int(mask.any(dim=1).logical_not().nonzero()[0])
            raise UserError(f"Sample {sample} of the batch has no tokens: leave out empty texts.")
        input_ids, mask = self.position_map.apply(input_ids, mask)
        # Right-padded now, so a causal backbone needs no mask.
        hidden = self.backbone(input_ids, mask if self.config.bidirectional else None)
        pooled = self._pool(hidden.last_hidden_state, mask)  # [B, d_model]
        with torch.autocast(pooled.device.type, enabled=False):  # logits are not rounded to half
            logits = self.head(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, S, d_model] to [B, d_model]; padding has no part in it."""
        num_real = mask.sum(dim=1)
        if self.config.pooling == "mean":
            return (hidden * mask[..., None]).sum(dim=1) / num_real[:, None]
        return hidden[torch.arange(len(hidden), device=hidden.device), num_real - 1]
