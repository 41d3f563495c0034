"""The Mamba student without a head: embedding, residual layers, last norm.

A layer is a mixer behind its norm, and an MLP behind another where the student has them; some
mixers may be attention. Names of modules and parameters are those of mamba_ssm's `MixerModel`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput, TransformersKwargs, can_return_tuple

from teacher_cache.stages.student.attention import Attention, KeysAndValues, Sight
from teacher_cache.stages.student.config import AUTO_MAP, MambaStudentConfig, describe_folder
from teacher_cache.stages.student.mixers import (
    CausalConvolution,
    Direction,
    LayerState,
    Layout,
    Mamba,
    Mamba2,
    StepProjection,
    reset_output_projection,
    reversed_positions,
)
from teacher_cache.stages.student.mlp import MLP
from teacher_cache.stages.student.norms import LayerNorm, RMSNorm
from teacher_cache.stages.student.position_map import places_of, real_first
from teacher_cache.stages.student.scans.recorded import RecordedMixer

_OLD, _NEW = "cache_params", "cache"
_SAYS_CACHE = hasattr(ModelOutput, _OLD)  # from transformers 5.24 on


class OutputWithCache(ModelOutput):
    """An output with a field `cache`, which is found as `cache_params` too.

    Up to 5.23 transformers' Mamba models and `generate` say `cache_params`, from 5.24 on every
    model says `cache`. A student answers to both under every release.
    """

    def get(self, key: str, default: Any = None) -> Any:
        """By name; a guided generation asks for its own state by `past_key_values`, thus alone."""
        return super().get(_NEW if key in (_OLD, "past_key_values") else key, default)

    if not _SAYS_CACHE:  # every output of those that do does all of this

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


def the_cache(
    cache: Cache | None, cache_params: Cache | None, past_key_values: Cache | None
) -> Cache | None:
    """What was given under one of a cache's names, if anything was.

    Where transformers says `cache`, the older name gets the warning that its own models give.

    Raises:
        ValueError: if it was under two.
    """
    if cache_params is not None and _SAYS_CACHE:
        warnings.warn(
            "`cache_params` is deprecated, as transformers' models have it: say `cache`",
            FutureWarning,
            stacklevel=3,
        )
    given = [one for one in (cache, cache_params, past_key_values) if one is not None]
    if len(given) > 1:
        raise ValueError(
            "cache, cache_params and past_key_values are names of one thing: give one of them"
        )
    return given[0] if given else None


def has_begun(cache: Cache) -> bool:
    """Whether something was read into a cache since it was made or reset."""
    first: Any = cache.layers[0]  # keys and values, or states
    has_state = getattr(first, "has_previous_state", None)
    return cache.get_seq_length(0) > 0 if has_state is None else has_state[0]


def refuse_foreign(keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that mean nothing to a student and would change what another model does.

    transformers, PEFT and TRL hand `TransformersKwargs` to every model, and what concerns
    attention alone has nothing to say here.

    Raises:
        TypeError: for a keyword that no model of transformers takes.
        ValueError: for a direction that a call cannot choose.
    """
    for name, value in keywords.items():
        if name not in TransformersKwargs.__optional_keys__ and value is not None:
            raise TypeError(f"a Mamba student's forward takes no {name!r}")
    if keywords.get("is_causal") is False:
        raise ValueError("a student's direction is its configuration's bidirectional, not a call's")


def documents_of(position_ids: Tensor | None, cache: Cache | None) -> Tensor | None:
    """The `seq_idx` of positions that begin anew with each document packed into a row.

    Args:
        position_ids: [B, S], or [1, S] for all rows; or none.
        cache: the states of an earlier call, or none.

    Returns:
        [B, S], or none where a row is one document.

    Raises:
        ValueError: if a document is to begin right behind a state, which cannot forget.
    """
    if position_ids is None:
        return None
    begins = position_ids == 0
    if torch.compiler.is_compiling():
        return begins.cumsum(-1)
    if cache is not None and has_begun(cache) and begins[:, 0].any():
        raise ValueError("position_ids begin at 0 behind a state: give positions that go on")
    return begins.cumsum(-1) if begins[:, 1:].any() else None


MIXERS: dict[str, type[Mamba] | type[Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}
OWN_START = (nn.Linear, nn.LayerNorm, RMSNorm, CausalConvolution, StepProjection, Direction)


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


def norm_of(config: MambaStudentConfig) -> RMSNorm | LayerNorm:
    """One of the residual stream's."""
    if config.norm == "layer":
        return LayerNorm(config.d_model, eps=config.norm_epsilon)
    return RMSNorm(config.d_model, epsilon=config.norm_epsilon)


class MambaLayer(GradientCheckpointingLayer):
    """One mixer behind its norm, and an MLP where the student has them.

    Args:
        config: of the student.
        layer_idx: counted from 0.
    """

    def __init__(self, config: MambaStudentConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = norm_of(config)
        self.mixer: Attention | Mamba | Mamba2
        if config.attention is not None and layer_idx in config.attn_layer_idx:
            self.mixer = Attention(config.attention, config.d_model)
        else:
            self.mixer = MIXERS[config.arch](config)
        self.mlp = MLP(config) if config.d_intermediate else None
        self.norm2 = None  # an MLP beside the mixer reads what the mixer reads
        if config.d_intermediate and not config.parallel_mlp:
            self.norm2 = norm_of(config)

    def state_of(self, cache: Cache, layer_idx: int) -> LayerState | KeysAndValues:
        """What its mixer goes on from."""
        kind = KeysAndValues if isinstance(self.mixer, Attention) else LayerState
        return kind(cache, layer_idx)

    def forward(
        self,
        residual: Tensor,
        layout: Layout,
        state: LayerState | KeysAndValues | None,
        record: list[RecordedMixer] | None = None,
    ) -> Tensor:
        """Add what mixer and MLP make of the residual stream [B, S, d_model]."""
        hidden = self.norm(residual)
        if isinstance(self.mixer, Attention):
            assert layout.sight is not None, "the configuration has attention layers"
            mixed = self.mixer(hidden, layout.sight, state)
        else:
            mixed = self.mixer(hidden, layout, state, record)
        residual = residual + mixed
        if self.mlp is None:
            return residual
        return residual + self.mlp(hidden if self.norm2 is None else self.norm2(residual))


class MambaStudentPreTrainedModel(PreTrainedModel):
    """What the student's models have in common: configuration, names, initial weights."""

    config_class = MambaStudentConfig
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["MambaLayer"]
    _is_stateful = True  # a state cannot be rolled back, so no assisted decoding
    supports_gradient_checkpointing = True

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As transformers does, with what a process that knows no student needs to load it."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            describe_folder(Path(save_directory), type(self).__name__)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: what is saved imports the class, where transformers would copy its source."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As mamba_ssm: embeddings from N(0, 0.02), linear maps as torch does, without bias."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, OWN_START):
            module.reset_parameters()
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, Attention):
            reset_output_projection(module.out_proj, self.config)
        if isinstance(module, MLP):
            reset_output_projection(module.fc2, self.config)


class MambaStudentModel(MambaStudentPreTrainedModel):
    """Token ids to one vector per position.

    Args:
        config: sizes and mixers; pooling, head and position map are the classifier's.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = None
        if config.num_positions:
            self.positions = nn.Embedding(config.num_positions, config.d_model)
        self.layers = nn.ModuleList(MambaLayer(config, one) for one in range(config.num_layers))
        self.norm_f = norm_of(config)
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
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        cache_params: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_hidden_states: bool | None = None,
        output_mixers: bool = False,
        **kwargs: Any,
    ) -> MambaStudentOutput:
        """Run all layers; padding on either side changes nothing at real positions.

        Args:
            input_ids: [B, S] integers.
            attention_mask: [B, S], nonzero at real positions; none where all are.
            inputs_embeds: [B, S, d_model] in place of `input_ids`.
            seq_idx: [B, S] integers that number the samples packed into one row, or none; neither
                state nor convolution crosses a change of value.
            position_ids: [B, S], which say the same by beginning at 0 with each sample; a student
                knows no positions otherwise.
            cache: the states of an earlier call, to go on from; updated in place.
            cache_params: the same, as transformers calls it up to 5.23.
            past_key_values: the same, as it calls that of a model whose name lacks "mamba".
            use_cache: start a new cache where none is given.
            output_hidden_states: return the residual stream too; the configuration's if not said.
            output_mixers: return what the scans ran with too, for `mixing_matrices`; of padded
                rows with a cache, in the order of `real_first`.
            kwargs: what transformers hands to every model, and concerns attention alone.

        Returns:
            States in the weights' dtype; the residual stream within is float32.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if two
                names of the cache are, if a bidirectional student is asked for one, if gradient
                checkpointing is to run with one, if mixers are asked for where some are attention,
                or if a text is longer than the table of positions.
            TypeError: for an unknown keyword.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        refuse_foreign(kwargs)
        if kwargs.get("cu_seq_lens_q") is not None and seq_idx is None and position_ids is None:
            raise ValueError(
                "cu_seq_lens_q tells a student nothing of where documents begin: give seq_idx or "
                "position_ids"
            )
        cache = self._cache_for(use_cache, the_cache(cache, cache_params, past_key_values))
        residual = cast(
            Tensor, self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        )
        residual = _widened(residual)
        mask = None if attention_mask is None else attention_mask.bool()
        if seq_idx is None:
            seq_idx = documents_of(position_ids, cache)
        seq_idx = None if seq_idx is None else seq_idx.expand(residual.shape[:2])
        # A state goes on from real positions to real ones, so padding stands behind them.
        turned = None if cache is None else mask
        if turned is not None:
            residual, seq_idx, mask = _padded_on_the_right(residual, seq_idx, turned)
        layout = self._layout(residual, mask, seq_idx, cache)
        if self.positions is not None and layout.sight is not None:
            residual = residual + self._position_rows(layout.sight)
        if output_mixers and self.config.attn_layer_idx:
            raise ValueError("a student with attention layers has no scan in each to be recorded")
        record: list[RecordedMixer] | None = [] if output_mixers else None
        streams = [residual]
        for layer_idx, layer in enumerate(self.layers):
            state = None if cache is None else layer.state_of(cache, layer_idx)
            streams.append(layer(streams[-1], layout, state, record))
        if cache is not None and layout.sight is not None:
            cache.visible = layout.sight.visible  # pyright: ignore[reportAttributeAccessIssue]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        kept = [self.norm_f(streams[-1]), *(streams if output_hidden_states else ())]
        if turned is not None:
            kept = [_taken(rows, places_of(turned)) for rows in kept]
        return MambaStudentOutput(
            last_hidden_state=kept[0],
            cache=cache,
            hidden_states=tuple(kept[1:]) or None,
            mixers=None if record is None else tuple(record),
        )

    def fed(
        self,
        states: Mapping[int, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor,
        seq_idx: Tensor | None = None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """What each layer makes of a given state, by itself and not of what those below it made.

        Args:
            states: [B, S, d_model] before a layer, by layer; those of the first are the student's
                own embeddings, and are not given.
            input_ids: [B, S] integers.
            attention_mask: [B, S], nonzero at real positions.
            seq_idx: [B, S] integers that number the samples packed into one row, or none.

        Returns:
            [B, S, d_model] before and behind each layer of `states`, and the first; what is
            before carries no gradient.
        """
        embedded = _widened(self.embedding(input_ids))
        layout = self._layout(embedded, attention_mask.bool(), seq_idx, None)
        if self.positions is not None and layout.sight is not None:
            embedded = embedded + self._position_rows(layout.sight)
        given = {0: embedded.detach(), **states}
        given = {index: state.to(embedded.dtype) for index, state in given.items()}
        return {
            index: (state, self.layers[index](state, layout, None))
            for index, state in given.items()
        }

    def _cache_for(self, use_cache: bool | None, cache: Cache | None) -> Cache | None:
        """The given cache, or a new one where one is asked for."""
        if not use_cache and cache is None:
            return None
        if self.config.bidirectional:
            raise ValueError("a bidirectional student has no state to go on from")
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            raise ValueError(
                "gradient checkpointing computes each layer twice and would move the state twice: "
                "train with use_cache=False"
            )
        return DynamicCache(config=self.config) if cache is None else cache

    def _layout(
        self, rows: Tensor, mask: Tensor | None, seq_idx: Tensor | None, cache: Cache | None
    ) -> Layout:
        sight = None
        if self.config.attn_layer_idx or self.positions is not None:
            sight = Sight.of(
                self.config.attention,
                rows.shape[:2],
                mask=mask,
                seq_idx=seq_idx,
                earlier=None if cache is None else _earlier(cache),
                device=rows.device,
            )
        if not self.config.bidirectional:
            return Layout(seq_idx=seq_idx, mask=mask, sight=sight)
        is_real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        positions = reversed_positions(is_real if mask is None else mask)
        return Layout(seq_idx=seq_idx, mask=mask, reversed_positions=positions, sight=sight)

    def _position_rows(self, sight: Sight) -> Tensor:
        """Of the table of positions, [B, S, d_model]."""
        assert self.positions is not None, "the caller has looked"
        num = self.config.num_positions
        if not torch.compiler.is_compiling() and int(sight.positions.max()) >= num:
            raise ValueError(f"a text is longer than the {num} positions that the student has")
        return self.positions(sight.positions)


def _widened(rows: Tensor) -> Tensor:
    """The residual stream is float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _earlier(cache: Cache) -> Tensor | None:
    """Which earlier positions can still be seen, [B, K] bool; none at the start."""
    return getattr(cache, "visible", None) if has_begun(cache) else None


def _padded_on_the_right(
    rows: Tensor, seq_idx: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows [B, S, D], their `seq_idx` and mask [B, S] with the real positions in front."""
    order = real_first(mask)
    if seq_idx is not None:  # padding counts to the last sample, whose state is to stay
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        position = torch.arange(mask.shape[1], device=mask.device).minimum(last)
        seq_idx = seq_idx.gather(1, order.gather(1, position))
    return _taken(rows, order), seq_idx, mask.gather(1, order)


def _taken(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [B, S, D] with their positions in another order [B, S]."""
    return rows.gather(1, order[..., None].expand_as(rows))
