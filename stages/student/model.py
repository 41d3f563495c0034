"""The Mamba student: embedding, residual layers of norm and mixer, pooling, head.

Names of modules and parameters below `backbone` are those of mamba_ssm's `MixerModel`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.heads import build_head
from teacher_cache.stages.student.mixers.mamba2 import Mamba2
from teacher_cache.stages.student.norms import RMSNorm
from teacher_cache.stages.student.position_map import PositionMap


class MambaLayer(nn.Module):
    """One mixer behind its norm."""

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__()
        low, high = config.A_init_range
        self.norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.mixer = Mamba2(
            config.d_model,
            expand=config.expand,
            d_state=config.d_state,
            head_dim=config.head_dim,
            d_conv=config.d_conv,
            ngroups=config.ngroups,
            chunk_size=config.chunk_size,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            dt_init_floor=config.dt_init_floor,
            A_init_range=(low, high),
            norm_epsilon=config.norm_epsilon,
            num_residuals=config.num_layers,
        )

    def forward(self, residual: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Add the mixer's output to the residual stream [B, S, d_model]."""
        return residual + self.mixer(self.norm(residual), seq_idx)


class MambaBackbone(nn.Module):
    """Token ids to one vector per position, each of which has seen the positions up to its own."""

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.num_layers))
        self.norm_f = RMSNorm(config.d_model, epsilon=config.norm_epsilon)

    def forward(self, input_ids: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Run all layers; what stands at right padding does not change what comes before it.

        Args:
            input_ids: [B, S] integers.
            seq_idx: [B, S] integers that number the samples packed into one row, or none.

        Returns:
            [B, S, d_model] in the weights' dtype; the residual stream within is float32.
        """
        residual = self.embedding(input_ids)
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        for layer in self.layers:
            residual = layer(residual, seq_idx)
        return self.norm_f(residual)


class MambaForSequenceClassification(PreTrainedModel):
    """A Mamba student with a classification head.

    Args:
        config: sizes, pooling, head and the position map, which `forward` applies.
    """

    config_class = MambaStudentConfig
    base_model_prefix = "backbone"

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        self.position_map = PositionMap.from_dict(config.position_map or {})
        self.backbone = MambaBackbone(config)
        self.head = build_head(
            config.head,
            d_model=config.d_model,
            num_labels=cast(int, config.num_labels),  # transformers always sets it
            dropout=config.dropout,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As mamba_ssm: embeddings from N(0, 0.02), linear maps as torch does, without bias."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.LayerNorm | RMSNorm | Mamba2):
            module.reset_parameters()
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)

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
        pooled = self._pool(self.backbone(input_ids), mask)  # [B, d_model]
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


def build_student(config: MambaStudentConfig, *, seed: int) -> MambaForSequenceClassification:
    """A student with fresh weights that depend on `config` and `seed` alone.

    The global random state is neither read nor changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MambaForSequenceClassification(config)
