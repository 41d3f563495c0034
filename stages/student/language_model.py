"""The Mamba student as a causal language model, with incremental decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.utils.generic import can_return_tuple

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.student.backbone import (
    MambaStudentModel,
    MambaStudentPreTrainedModel,
    OutputWithCache,
    the_cache,
)
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.scans.recorded import RecordedMixer


@dataclass
class MambaStudentCausalLMOutput(OutputWithCache):
    """Next-token predictions.

    Attributes:
        loss: mean cross-entropy over the targets, nats; none without labels.
        logits: [B, S, V] float32; none where the states were asked for in their place.
        final_states: [B, S, d_model], what the head reads, where they were asked for.
        cache: the layers' states after the last position, where they were asked for.
        hidden_states: as in `MambaStudentOutput`.
        mixers: as in `MambaStudentOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    final_states: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    mixers: tuple[RecordedMixer, ...] | None = None


class MambaStudentForCausalLM(MambaStudentPreTrainedModel, GenerationMixin):
    """A Mamba student that predicts the next token; `generate` runs with a state of constant size.

    Args:
        config: of a student that is not bidirectional; pooling, head and position map are the
            classifier's. With `tie_word_embeddings` the head is the embedding table.

    Raises:
        UserError: for a bidirectional student, which would read what it is to predict.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embedding.weight"}

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        if config.bidirectional:
            raise UserError(
                "A bidirectional student cannot be a language model, since it reads what it is to "
                "predict: leave bidirectional out."
            )
        self.backbone = MambaStudentModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @property
    def output_head(self) -> LinearHead:
        """The head, as a loss takes it."""
        return LinearHead(weight=self.lm_head.weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_mixers: bool = False,
        states_only: bool = False,
    ) -> MambaStudentCausalLMOutput:
        """Predict each position's next token.

        Args:
            input_ids: [B, S] integers.
            attention_mask: [B, S], nonzero at real tokens, padded on either side; a longer one
                covers tokens of earlier calls too, and only its end is read.
            inputs_embeds: [B, S, d_model] in place of `input_ids`.
            seq_idx: [B, S] integers that number the documents packed into one row, or none.
            labels: [B, S] the tokens themselves, -100 where a token is no target; they are
                shifted here. With `seq_idx`, no document's first token is a target.
            cache: the states of an earlier call, to go on from; updated in place.
            cache_params: the same, as transformers calls it up to 5.23.
            use_cache: return the states; the configuration's `use_cache` if not said, except in
                training.
            logits_to_keep: how many positions at the end, or which, get logits; 0 for all.
            output_hidden_states: return the residual stream too.
            output_mixers: return what the scans ran with too.
            states_only: return what the head reads, and no logits: a loss that takes the head's
                weights itself needs only a few positions' at a time.

        Returns:
            Loss, logits and what was asked for.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if attention_mask is not None:
            rows = input_ids if input_ids is not None else inputs_embeds
            attention_mask = attention_mask[:, -rows.shape[1] :]  # pyright: ignore[reportOptionalMemberAccess]
        output = self.backbone(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            cache=the_cache(cache, cache_params),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_mixers=output_mixers,
        )
        if states_only:
            return MambaStudentCausalLMOutput(
                final_states=output.last_hidden_state,
                cache=output.cache,
                hidden_states=output.hidden_states,
                mixers=output.mixers,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return MambaStudentCausalLMOutput(
            loss=None if labels is None else _next_token_loss(logits, labels, seq_idx),
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            mixers=output.mixers,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """After the first step only the new token is read, and all of it is real."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  (the mixin's protocol)
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            inputs["attention_mask"] = None
        return inputs


def _next_token_loss(logits: Tensor, labels: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Mean cross-entropy of each position's logits [B, S, V] to the next one's label."""
    targets = labels[:, 1:]
    if seq_idx is not None:
        targets = targets.masked_fill(seq_idx[:, 1:] != seq_idx[:, :-1], NO_LABEL)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=NO_LABEL)
