"""What is cached of a teacher's layers beside its logits: attention maps and hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.attention import AttentionCodec, PooledAt, attention_field
from teacher_cache.cache.codecs.hidden import HIDDEN
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import FieldSpec, Schema
from teacher_cache.stages.teacher.attention_modules import PROBE_TEXT, MapSource, find_maps
from teacher_cache.stages.teacher.config import ShardConfig
from teacher_cache.stages.teacher.layer_options import (
    HiddenOptions,
    chosen_layers,
    hidden_options,
    require_states,
)
from teacher_cache.stages.teacher.load import EAGER, Teacher

LARGEST_HALF = float(np.finfo(np.float16).max)  # 65,504


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Maps and states to cache; of neither, where none is asked for.

    Attributes:
        attention: how maps are stored; None where none are.
        source: where the model makes them; None where none are stored.
        hidden: states that are asked for; pooled ones are a classifier's, and not of this plan.
        widths: D of each field of states, by its name.
    """

    attention: AttentionCodec | None
    source: MapSource | None
    hidden: HiddenOptions
    widths: Mapping[str, int]

    @classmethod
    def prepared(
        cls, config: ShardConfig, teacher: Teacher, *, is_packed: bool = False
    ) -> LayerPlan:
        """Look at the teacher and settle what the options mean for it.

        Args:
            config: that `check_layer_options` let pass.
            teacher: on its device.
            is_packed: samples hold several documents.

        Raises:
            UserError: if the teacher gives no maps or states, or not those of a layer asked for.
        """
        source = None if config.attention == "none" else find_maps(teacher)
        hidden = hidden_options(config)
        return cls(
            attention=None
            if source is None
            else _attention_codec(config, teacher, source, is_packed=is_packed),
            source=source,
            hidden=hidden,
            widths=_widths(hidden, teacher),
        )

    @property
    def fields(self) -> Schema:
        """What a sample gets of it."""
        states = tuple(
            FieldSpec(name=name, dtype="float16", shape=("S", width))
            for name, width in self.widths.items()
        )
        return states if self.attention is None else (*self.attention.fields, *states)

    @property
    def states(self) -> dict[str, int | None]:
        """The layer of each field of states; None for the last states."""
        last: dict[str, int | None] = {HIDDEN: None} if self.hidden.last else {}
        return last | {hidden_field(layer): layer for layer in self.hidden.layers}

    def settings(self) -> dict[str, Any]:
        """For the fingerprint; absent where nothing is asked for, so older caches keep theirs."""
        named = self.hidden.named()
        found: dict[str, Any] = {} if named is None else {"hidden": named}
        if self.attention is not None:
            found["attention"] = self.attention.settings | {"implementation": EAGER}
        return found

    def num_bytes(self, lengths: Sequence[int]) -> int:
        """Of a sample's fields, and of their ends.

        Args:
            lengths: of its pieces: one, but where several documents are packed.
        """
        maps = 0 if self.attention is None else self.attention.num_bytes(lengths)
        states = 2 * sum(self.widths.values()) * sum(lengths)
        return maps + states + 4 * len(self.fields)

    def encode(self, name: str, values: Tensor) -> np.ndarray:
        """One piece of a field as it is stored.

        Args:
            name: of the field.
            values: a map as `AttentionCodec.encode` takes it, or states [n, D].

        Raises:
            UserError: if a state has a value that float16 does not hold.
        """
        if name in self.widths:
            exact = values.float().cpu().numpy()
            return half(exact, what="states", option=f"--hidden {self.hidden.named()}")
        assert self.attention is not None, "no other field is of a plan"
        return self.attention.encode(values)


NO_LAYERS = LayerPlan(attention=None, source=None, hidden=HiddenOptions(), widths={})
"""Neither maps nor states."""


def hidden_field(layer: int) -> str:
    """The name of a layer's states."""
    return f"{HIDDEN}_{layer}"


def half(states: np.ndarray, *, what: str, option: str) -> np.ndarray:
    """States [N, D] in float16.

    Args:
        states: float32.
        what: they are called in a message.
        option: that asked for them.

    Raises:
        UserError: if a value is too large for it, or no number.
    """
    fits = (np.abs(states) <= LARGEST_HALF).all(axis=1)
    if not fits.all():
        raise UserError(
            f"{int((~fits).sum())} of the teacher's {what} have values beyond {LARGEST_HALF:,.0f}, "
            f"the most that float16 holds: make the cache without {option}"
        )
    return states.astype(np.float16)


def _attention_codec(
    config: ShardConfig, teacher: Teacher, source: MapSource, *, is_packed: bool
) -> AttentionCodec:
    layers = chosen_layers(config.attention_layers, source.layers, teacher.name)
    heads = {h for layer, h in zip(source.layers, source.num_heads, strict=True) if layer in layers}
    if len(heads) > 1:
        raise UserError(
            f"layers of {teacher.name} have {' and '.join(map(str, sorted(heads)))} heads: give "
            "--attention-layers that have as many"
        )
    assert config.attention != "none", "asked before"
    return AttentionCodec(
        mode=config.attention,
        layers=layers,
        num_heads=heads.pop(),
        is_causal=source.is_causal,
        is_packed=is_packed,
        pooled_at=_pooled_at(teacher, source) if config.attention == "cls" else None,
    )


def _pooled_at(teacher: Teacher, source: MapSource) -> PooledAt:
    """A causal model pools at its last token, others at the tokenizer's [CLS].

    Raises:
        UserError: if there is no such token.
    """
    if source.is_causal:
        return "last"
    ids = teacher.tokenizer(PROBE_TEXT)["input_ids"]
    cls_id = teacher.tokenizer.cls_token_id
    if cls_id in (ids[0], ids[-1]):
        return "first" if cls_id == ids[0] else "last"
    raise UserError(
        f"--attention cls needs a pooled position, and the tokenizer of {teacher.name} begins or "
        "ends no text with a [CLS] token: give --attention mean"
    )


def _widths(hidden: HiddenOptions, teacher: Teacher) -> dict[str, int]:
    """D of each field of states, from one short text."""
    if not (hidden.last or hidden.layers):
        return {}
    ids = torch.tensor([teacher.tokenizer(PROBE_TEXT)["input_ids"]], device=teacher.device)
    with torch.inference_mode():
        output = teacher.model.base_model(input_ids=ids, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states or output.last_hidden_state is None:
        raise UserError(
            f"{teacher.name} ({type(teacher.model).__name__}) gives no hidden states of its "
            f"layers: leave --hidden {hidden.named()} out"
        )
    require_states(hidden, len(states) - 1, teacher.name)
    last = {HIDDEN: output.last_hidden_state.shape[-1]} if hidden.last else {}
    return last | {hidden_field(i): states[i + 1].shape[-1] for i in hidden.layers}


def maps_of(attention: AttentionCodec) -> dict[int, str]:
    """The field of each layer's map."""
    return {layer: attention_field(layer) for layer in attention.layers}
