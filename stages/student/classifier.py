"""The Mamba student as a text classifier: backbone, pooling, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.linear_head import linear_cross_entropy
from teacher_cache.stages.student.backbone import MambaStudentModel, MambaStudentPreTrainedModel
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.student.scans.recorded import RecordedMixer


def build_head(kind: str, *, d_model: int, num_labels: int, dropout: float) -> nn.Sequential:
    """A head from [B, d_model] to [B, num_labels].

    Args:
        kind: "mlp" (norm, linear, GELU, dropout, linear) or "linear" (dropout, linear).
        d_model: width of the pooled vector, and of the hidden layer.
        num_labels: C.
        dropout: probability.
    """
    if kind == "linear":
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(d_model, num_labels))
    return nn.Sequential(
        nn.LayerNorm(d_model),
        nn.Linear(d_model, d_model),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(d_model, num_labels),
    )


@dataclass
class MambaStudentClassifierOutput(SequenceClassifierOutput):
    """Class logits and what was asked for beside them.

    Attributes:
        next_token_loss_sum: scalar, nats, float32 or wider: cross-entropies of every position's
            next token, summed over the batch.
        pooled: [B, d_model], what the head reads.
        hidden_states: as in `MambaStudentOutput`, in the student's order, padded on the right.
        mixers: as in `MambaStudentOutput`, in the same order.
    """

    next_token_loss_sum: Tensor | None = None
    pooled: Tensor | None = None
    mixers: tuple[RecordedMixer, ...] | None = None


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
        *,
        next_token_loss: bool = False,
        pooled_state: bool = False,
        output_hidden_states: bool = False,
        output_mixers: bool = False,
    ) -> MambaStudentClassifierOutput:
        """Classify a batch of samples of different lengths, padded on either side.

        Args:
            input_ids: [B, S] integers, in the tokenizer's order.
            attention_mask: [B, S], nonzero at real tokens; without one, every token is real,
                whatever `pad_token_id` says.
            labels: [B] class indices; with them the output holds the mean cross-entropy.
            token_type_ids: ignored: BERT's tokenizers emit them, the student has no segments.
            next_token_loss: also predict each position's next token, in the student's order, with
                the embedding table as the head.
            pooled_state: also return what the head reads.
            output_hidden_states: also return the residual stream.
            output_mixers: also return what the scans ran with.

        Returns:
            `logits` [B, C] float32, and `loss` where labels are given.

        Raises:
            UserError: if a sample has no tokens.
            ValueError: if a bidirectional student is asked for the next token, which it has read.
        """
        if next_token_loss and self.config.bidirectional:
            raise ValueError("a bidirectional student has read the next token")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.bool()
        # A traced graph cannot raise; what it makes of a sample without tokens means nothing.
        if not torch.compiler.is_compiling() and not mask.any(dim=1).all():
            sample = int(mask.any(dim=1).logical_not().nonzero()[0])
            raise UserError(f"Sample {sample} of the batch has no tokens: leave out empty texts.")
        input_ids, mask = self.position_map.apply(input_ids, mask)
        # Right-padded now, so a causal backbone needs no mask.
        hidden = self.backbone(
            input_ids,
            mask if self.config.bidirectional else None,
            output_hidden_states=output_hidden_states,
            output_mixers=output_mixers,
        )
        pooled = self._pool(hidden.last_hidden_state, mask)  # [B, d_model]
        with torch.autocast(pooled.device.type, enabled=False):  # logits are not rounded to half
            logits = self.head(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MambaStudentClassifierOutput(
            loss=loss,
            logits=logits,
            next_token_loss_sum=self._next_token_loss_sum(hidden.last_hidden_state, input_ids, mask)
            if next_token_loss
            else None,
            pooled=pooled if pooled_state else None,
            hidden_states=hidden.hidden_states,
            mixers=hidden.mixers,
        )

    def num_next_tokens(self, attention_mask: Tensor) -> int:
        """How many terms `next_token_loss_sum` has: all real positions but each sample's first.

        Args:
            attention_mask: [B, S], nonzero at real tokens, as `forward` takes it.
        """
        num_appended = 0 if self.position_map.token_id is None else len(attention_mask)
        return int(attention_mask.bool().sum()) + num_appended - len(attention_mask)

    def _next_token_loss_sum(self, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Of states [B, S, d_model] after the last norm and ids [B, S], padded on the right."""
        has_next = mask[:, 1:].flatten().nonzero().flatten()  # [N]
        return linear_cross_entropy(
            hidden[:, :-1].flatten(0, 1).index_select(0, has_next),
            self.backbone.embedding.weight,
            input_ids[:, 1:].flatten()[has_next],
        )

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, S, d_model] to [B, d_model]; padding has no part in it."""
        num_real = mask.sum(dim=1)
        if self.config.pooling == "mean":
            return (hidden * mask[..., None]).sum(dim=1) / num_real[:, None]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), num_real - 1]
