"""A classifier on transformers' own Mamba, as one file of code that an exported folder brings.

It imports torch and transformers alone: `pipe export --to transformers` puts it beside the weights
as it is, and `AutoModelForSequenceClassification.from_pretrained` with `trust_remote_code=True`
runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Mamba2Config,
    Mamba2Model,
    MambaConfig,
    MambaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

BACKBONES = {"mamba": (MambaConfig, MambaModel), "mamba2": (Mamba2Config, Mamba2Model)}


class DistilledMambaConfig(PreTrainedConfig):
    """Of a distilled classifier.

    Args:
        backbone: fields of transformers' `MambaConfig` or `Mamba2Config`.
        position_map: how tokens are reordered first: "identity", "move_first_to_last" (a
            classification token goes where it has seen all), or "append".
        appended_id: the token that "append" puts behind each text.
        pooling: "mean" over the real tokens; else the last real one is read.
        head: "mlp" or "linear".
        dropout: in the head.
    """

    model_type = "distilled_mamba"

    backbone: dict[str, Any] | None = None
    position_map: str = "identity"
    appended_id: int | None = None
    pooling: str = "last"
    head: str = "mlp"
    dropout: float = 0.0


class DistilledMambaForSequenceClassification(PreTrainedModel):
    """transformers' Mamba with a classification head."""

    config_class = DistilledMambaConfig
    base_model_prefix = "backbone"

    def __init__(self, config: DistilledMambaConfig) -> None:
        super().__init__(config)
        fields = dict(config.backbone or {})
        config_class, model_class = BACKBONES[fields["model_type"]]
        inner = config_class(**fields)
        width, num = inner.hidden_size, config.num_labels
        self.backbone = model_class(inner)
        linear = [nn.Dropout(config.dropout), nn.Linear(width, num)]
        mlp = [nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), *linear]
        self.head = nn.Sequential(*(linear if config.head == "linear" else mlp))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts of different lengths, padded on either side.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], nonzero at real tokens; without one every token is real.
            labels: [B] classes; with them the output has a loss.
            kwargs: not read (`token_type_ids`, say).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, is_real = self._ordered(input_ids, mask.bool())
        # Padding stands behind now, where a causal model's real positions do not look.
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        num_real = is_real.sum(dim=1)
        if self.config.pooling == "mean":
            pooled = (hidden * is_real[..., None]).sum(dim=1) / num_real[:, None]
        else:
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), num_real - 1]
        logits = self.head(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _ordered(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens in the order in which they are read, padded on the right, and which are real."""
        batch, width = ids.shape
        num_real = mask.sum(dim=1, keepdim=True)
        places = torch.arange(width, device=ids.device).expand(batch, width)
        # Stable, so that real tokens keep their order.
        first = torch.sort((~mask).long(), dim=1, stable=True).indices
        if self.config.position_map == "move_first_to_last":
            turned = (places + 1) % num_real.clamp(min=1)
            first = first.gather(1, torch.where(places < num_real, turned, places))
        ids = ids.gather(1, first)
        if self.config.position_map == "append":
            ids = nn.functional.pad(ids, (0, 1))
            ids = ids.scatter(1, num_real, int(self.config.appended_id or 0))
            num_real = num_real + 1
            places = torch.arange(width + 1, device=ids.device).expand(batch, width + 1)
        return ids, places < num_real
