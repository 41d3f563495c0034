"""The Mamba student as a text classifier: backbone, pooling, head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.linear_head import linear_cross_entropy
from teacher_cache.stages.student.backbone import (
    MambaStudentModel,
    MambaStudentPreTrainedModel,
    refuse_foreign,
)
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        next_token_loss: bool = False,
        pooled_state: bool = False,
        output_hidden_states: bool | None = None,
        output_mixers: bool = False,
        **kwargs: Any,
    ) -> MambaStudentClassifierOutput:
        """Classify a batch of samples of different lengths, padded on either side.

        Args:
            input_ids: [B, S] integers, in the tokenizer's order.
            attention_mask: [B, S], nonzero at real tokens; without one, every token is real,
                whatever `pad_token_id` says.
            labels: [B] class indices, [B, C] zeros and ones, or [B] or [B, C] numbers; with them
                the output holds the loss of the configuration's `problem_type`, as every
                classifier of transformers has it.
            token_type_ids: ignored: BERT's tokenizers emit them, the student has no segments.
            inputs_embeds: [B, S, d_model] in place of `input_ids`.
            position_ids: ignored: a row is one sample, and the student knows no positions.
            use_cache: ignored: a classifier goes on from no state.
            num_items_in_batch: what the sum of the samples' cross-entropies is divided by, the
                samples of all batches that share an update; their own number if none.
            next_token_loss: also predict each position's next token, in the student's order, with
                the embedding table as the head.
            pooled_state: also return what the head reads.
            output_hidden_states: also return the residual stream; the configuration's if not said.
            output_mixers: also return what the scans ran with.
            kwargs: what transformers hands to every model, and concerns attention alone.

        Returns:
            `logits` [B, C] float32, and `loss` where labels are given.

        Raises:
            UserError: if a sample has no tokens.
            ValueError: if a bidirectional student is asked for the next token, which it has read,
                or any student without `input_ids` is; or if several samples share a row.
            TypeError: for an unknown keyword.
        """
        if next_token_loss and self.config.bidirectional:
            raise ValueError("a bidirectional student has read the next token")
        if next_token_loss and input_ids is None:
            raise ValueError("inputs_embeds do not say which token is next: give input_ids")
        refuse_foreign(kwargs)
        if kwargs.get("seq_idx") is not None or kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("a classifier reads one sample a row: give no packed rows")
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        mask = torch.ones_like(given[..., 0] if given.ndim == 3 else given, dtype=torch.bool)
        if attention_mask is not None:
            mask = attention_mask.bool()
        # A traced graph cannot raise; what it makes of a sample without tokens means nothing.
        if not torch.compiler.is_compiling() and not mask.any(dim=1).all():
            sample = int(mask.any(dim=1).logical_not().nonzero()[0])
            raise UserError(f"Sample {sample} of the batch has no tokens: leave out empty texts.")
        if input_ids is not None:
            input_ids, mask = self.position_map.apply(input_ids, mask)
        else:
            inputs_embeds, mask = self._mapped(cast(Tensor, inputs_embeds), mask)
        # Right-padded now, so a causal backbone needs no mask.
        hidden = self.backbone(
            input_ids,
            mask if self.config.bidirectional else None,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_mixers=output_mixers,
            return_dict=True,
        )
        pooled = self._pool(hidden.last_hidden_state, mask)  # [B, d_model]
        with torch.autocast(pooled.device.type, enabled=False):  # logits are not rounded to half
            logits = self.head(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels, logits, config=self.config, num_items_in_batch=num_items_in_batch
            )
        return MambaStudentClassifierOutput(
            loss=loss,
            logits=logits,
            next_token_loss_sum=self._next_token_loss_sum(
                hidden.last_hidden_state, cast(Tensor, input_ids), mask
            )
            if next_token_loss
            else None,
            pooled=pooled if pooled_state else None,
            hidden_states=hidden.hidden_states,
            mixers=hidden.mixers,
        )

    def _mapped(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`position_map.apply` to embeddings [B, S, d_model]; an appended token is row S."""
        batch, width = mask.shape
        token_id, of_positions = self.position_map.token_id, self.position_map
        if token_id is not None:
            of_positions = replace(self.position_map, token_id=width)
            appended = self.backbone.embedding(torch.tensor([[token_id]], device=embeds.device))
            embeds = torch.cat([embeds, appended.expand(batch, -1, -1)], dim=1)
        positions = torch.arange(width, device=embeds.device).expand(batch, -1)
        sources, mask = of_positions.apply(positions, mask)
        return embeds.gather(1, sources[..., None].expand(-1, -1, embeds.shape[-1])), mask

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
