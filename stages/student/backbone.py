"""The Mamba student without a head: embedding, residual layers of norm and mixer, last norm.

Names of modules and parameters are those of mamba_ssm's `MixerModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.mixers import (
    Direction,
    LayerState,
    Layout,
    Mamba,
    Mamba2,
    reversed_positions,
)
from teacher_cache.stages.student.norms import RMSNorm
from teacher_cache.stages.student.scans.recorded import RecordedMixer

_OLD, _NEW = "cache_params", "cache"


class OutputWithCache(ModelOutput):
    """An output with a field `cache`, which is found as `cache_params` too.

    Up to 5.23 transformers' Mamba models and `generate` say `cache_params`, from 5.24 on every
    model says `cache`. A student answers to both under every release.
    """

    if not hasattr(ModelOutput, _OLD):  # from 5.24 on every output does all of this

        def __contains__(self, key: object) -> bool:
            """Whether something is there under this name."""
            return super().__contains__(_NEW if key == _OLD else key)

        def __getitem__(self, k: Any) -> Any:
            """By name, or by place among what is not None."""
            return super().__getitem__(_NEW if k == _OLD else k)

        @property
        def cache_params(self) -> Cache | None:
            """The states, under their older name."""
            return getattr(self, _NEW)


def the_cache(cache: Cache | None, cache_params: Cache | None) -> Cache | None:
    """The one of the two that was given, if any was.

    Raises:
        ValueError: if both were.
    """
    if cache is not None and cache_params is not None:
        raise ValueError("cache and cache_params are two names of one thing: give one")
    return cache_params if cache is None else cache


MIXERS: dict[str, type[Mamba] | type[Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}


@dataclass
class MambaStudentOutput(OutputWithCache):
    """What the backbone makes of a batch.

    Attributes:
        last_hidden_state: [B, S, d_model] after the last norm.
        cache: the layers' states after the last position, where they were asked for.
        hidden_states: with `output_hidden_states`, the residual stream [B, S, d_model] before the
            first layer and after each; not normalised.
        mixers: with `output_mixers`, what each layer's scans ran with.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    mixers: tuple[RecordedMixer, ...] | None = None


class MambaLayer(nn.Module):
    """One mixer behind its norm."""

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.mixer = MIXERS[config.arch](config)

    def forward(
        self,
        residual: Tensor,
        layout: Layout,
        state: LayerState | None,
        record: list[RecordedMixer] | None = None,
    ) -> Tensor:
        """Add the mixer's output to the residual stream [B, S, d_model]."""
        return residual + self.mixer(self.norm(residual), layout, state, record)


class MambaStudentPreTrainedModel(PreTrainedModel):
    """What the student's models have in common: configuration, names, initial weights."""

    config_class = MambaStudentConfig
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["MambaLayer"]
    _is_stateful = True  # a state cannot be rolled back, so no assisted decoding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As mamba_ssm: embeddings from N(0, 0.02), linear maps as torch does, without bias."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.LayerNorm | RMSNorm | Direction):
            module.reset_parameters()
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)


class MambaStudentModel(MambaStudentPreTrainedModel):
    """Token ids to one vector per position.

    Args:
        config: sizes and mixers; pooling, head and position map are the classifier's.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.num_layers))
        self.norm_f = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding table in its place."""
        self.embedding = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        cache_params: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_mixers: bool = False,
    ) -> MambaStudentOutput:
        """Run all layers; padding on either side changes nothing at real positions.

        Args:
            input_ids: [B, S] integers.
            attention_mask: [B, S], nonzero at real positions; none where all are.
            inputs_embeds: [B, S, d_model] in place of `input_ids`.
            seq_idx: [B, S] integers that number the samples packed into one row, or none; neither
                state nor convolution crosses a change of value.
            cache: the states of an earlier call, to go on from; updated in place.
            cache_params: the same, as transformers calls it up to 5.23.
            use_cache: start a new cache where none is given.
            output_hidden_states: return the residual stream too.
            output_mixers: return what the scans ran with too, for `mixing_matrices`.

        Returns:
            States in the weights' dtype; the residual stream within is float32.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if both
                names of the cache are, or if a bidirectional student is asked for one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        cache = the_cache(cache, cache_params)
        if self.config.bidirectional and (use_cache or cache is not None):
            raise ValueError("a bidirectional student has no state to go on from")
        residual = cast(
            Tensor, self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        )
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        layout = self._layout(residual, attention_mask, seq_idx)
        streams = [residual]
        record: list[RecordedMixer] | None = [] if output_mixers else None
        for layer_idx, layer in enumerate(self.layers):
            state = None if cache is None else LayerState(cache, layer_idx)
            residual = layer(residual, layout, state, record)
            streams.append(residual)
        return MambaStudentOutput(
            last_hidden_state=self.norm_f(residual),
            cache=cache,
            hidden_states=tuple(streams) if output_hidden_states else None,
            mixers=None if record is None else tuple(record),
        )

    def _layout(
        self, rows: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None
    ) -> Layout:
        mask = None if attention_mask is None else attention_mask.bool()
        if not self.config.bidirectional:
            return Layout(seq_idx=seq_idx, mask=mask)
        is_real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        positions = reversed_positions(is_real if mask is None else mask)
        return Layout(seq_idx=seq_idx, mask=mask, reversed_positions=positions)
