"""The Mamba student as a causal language model, with incremental decoding."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.student.backbone import (
    MambaStudentModel,
    MambaStudentPreTrainedModel,
    OutputWithCache,
    documents_of,
    has_begun,
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
        attentions: none; `generate` asks every model for them.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    final_states: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    mixers: tuple[RecordedMixer, ...] | None = None
    attentions: None = None


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
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @property
    def output_head(self) -> LinearHead:
        """The head, as a loss takes it."""
        return LinearHead(weight=self.lm_head.weight, bias=self.lm_head.bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        cache_params: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_mixers: bool = False,
        states_only: bool = False,
        **kwargs: Any,
    ) -> MambaStudentCausalLMOutput:
        """Predict each position's next token.

        Args:
            input_ids: [B, S] integers.
            attention_mask: [B, S], nonzero at real tokens, padded on either side; a longer one
                covers tokens of earlier calls too, and only its end is read.
            inputs_embeds: [B, S, d_model] in place of `input_ids`.
            seq_idx: [B, S] integers that number the documents packed into one row, or none.
            position_ids: [B, S], which say the same by beginning at 0 with each document.
            token_type_ids: ignored: BERT's tokenizers emit them, the student has no segments.
            labels: [B, S] the tokens themselves, -100 where a token is no target; they are
                shifted here. With documents in a row, no document's first token is a target.
            shift_labels: [B, S] each position's next token, shifted already, in place of `labels`.
            num_items_in_batch: what the sum of the targets' losses is divided by, the targets of
                all batches that share an update; their own number if none.
            cache: the states of an earlier call, to go on from; updated in place.
            cache_params: the same, as transformers calls it up to 5.23.
            past_key_values: the same, as it calls that of a model whose name lacks "mamba".
            use_cache: return the states; the configuration's `use_cache` if not said, except in
                training.
            logits_to_keep: how many positions at the end, or which, get logits; 0 for all.
            output_hidden_states: return the residual stream too; the configuration's if not said.
            output_mixers: return what the scans ran with too.
            states_only: return what the head reads, and no logits: a loss that takes the head's
                weights itself needs only a few positions' at a time.
            kwargs: what transformers hands to every model, and concerns attention alone.

        Returns:
            Loss, logits and what was asked for.

        Raises:
            ValueError: as the backbone does.
            TypeError: for an unknown keyword.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if attention_mask is not None:
            rows = input_ids if input_ids is not None else inputs_embeds
            attention_mask = attention_mask[:, -rows.shape[1] :]  # pyright: ignore[reportOptionalMemberAccess]
        cache = the_cache(cache, cache_params, past_key_values)
        if seq_idx is None:
            seq_idx = documents_of(position_ids, cache)
        is_first = cache is None or not has_begun(cache)
        output = self.backbone(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_mixers=output_mixers,
            return_dict=True,
            **kwargs,
        )
        if output.cache is not None and is_first:
            output.cache.first_read = input_ids  # see `_refuse_what_was_read`
        logits = loss = None
        if not states_only:
            kept = logits_to_keep
            kept = slice(-kept, None) if isinstance(kept, int) else kept
            logits = self.lm_head(output.last_hidden_state[:, kept])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = {"labels": labels, "shift_labels": shift_labels}
            loss = self._loss(logits, seq_idx, num_items_in_batch, **targets)
        return MambaStudentCausalLMOutput(
            loss=loss,
            logits=logits,
            final_states=output.last_hidden_state if states_only else None,
            cache=output.cache,
            hidden_states=output.hidden_states,
            mixers=output.mixers,
        )

    def _loss(
        self,
        logits: Tensor,
        seq_idx: Tensor | None,
        num_items: Tensor | int | None,
        *,
        labels: Tensor | None,
        shift_labels: Tensor | None,
    ) -> Tensor | None:
        """The loss by transformers of logits [B, S, V], if there are labels of either kind."""
        if labels is None and shift_labels is None:
            return None
        if labels is not None and seq_idx is not None:
            # No document's first token is a target of the one before it.
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            labels = labels.masked_fill(begins, NO_LABEL)
        return self.loss_function(
            logits,
            labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items,
            shift_labels=shift_labels,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """By the class's name, after which `generate` names a cache; else a student makes one."""
        return "mamba" in cls.__name__.lower()

    def prepare_inputs_for_generation(  # the parameter is how `generate` knows that it may be given
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """After the first step only the new token is read, and all of it is real.

        Raises:
            ValueError: if what a given state has read is to be read once more.
        """
        is_first = kwargs.get("is_first_iteration")
        if is_first and inputs_embeds is None:
            names = ("cache", "cache_params", "past_key_values")
            _refuse_what_was_read(the_cache(*(kwargs.get(name) for name in names)), input_ids)
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]  (the mixin's protocol)
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if kwargs.get("use_cache") and not is_first:
            inputs["attention_mask"] = None
        # `generate` has refused foreign names before. It adds some of its own, such as the
        # tokenizer of stop strings, and positions, which begin at 0 behind a state too.
        known = {*signature(self.forward).parameters, *TransformersKwargs.__optional_keys__}
        return {name: inputs[name] for name in known & inputs.keys() - {"position_ids"}}


def _refuse_what_was_read(cache: Cache | None, input_ids: Tensor) -> None:
    """Refuse a whole text behind the state of its beginning: a state cannot be read twice.

    What a cache was first given is compared, the whole of it may have been reordered by beams.
    """
    read = getattr(cache, "first_read", None)
    if cache is None or read is None or not has_begun(cache):
        return
    begins = input_ids[:, : read.shape[1]]
    if input_ids.shape[1] > read.shape[1] and torch.equal(begins, read.to(begins.device)):
        raise ValueError(
            f"the text begins with the {read.shape[1]} tokens that the state has read already: "
            "give generate the tokens behind them alone"
        )
