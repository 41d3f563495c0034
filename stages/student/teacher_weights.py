"""A transformer language model's layers as its folder holds them, one at a time.

Each family names its parts in its own way, and some multiply what others do not. What is read here
is free of that: products and sums alone, as `TeacherLayer` says, with every fixed factor of the
teacher's configuration inside its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.attention_shape import AttentionShape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A product and what is added: `weight` [out, in], or [size] of a norm; `bias` or none."""

    weight: Tensor
    bias: Tensor | None = None

    def times(self, factor: float) -> Affine:
        """Both multiplied."""
        bias = None if self.bias is None else self.bias * factor
        return Affine(weight=self.weight * factor, bias=bias)


@dataclass(frozen=True, kw_only=True)
class TeacherLayer:
    """One layer: attention behind a norm, an MLP behind another or beside it.

    Attributes:
        norm: before the attention.
        norm2: before the MLP; none where both read the first.
        queries: [H P, D].
        keys: [H' P, D].
        values: [H' P, D].
        output: [D, H P].
        query_norm: [P], or none.
        key_norm: [P], or none.
        up: [I, D], what is gated, or all that a plain MLP has.
        gate: [I, D], or none.
        down: [D, I].
    """

    norm: Affine
    norm2: Affine | None
    queries: Affine
    keys: Affine
    values: Affine
    output: Affine
    query_norm: Tensor | None
    key_norm: Tensor | None
    up: Affine
    gate: Affine | None
    down: Affine


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of model names its parts, and what of its configuration changes numbers.

    Attributes:
        prefix: of all but the head.
        layer: of each layer, with `{}` for its number.
        names: the part's name to the folder's, of a layer.
        embeddings: the folder's names of the tables.
        norm: "rms" or "layer".
        norm_bias_one: whether a norm's weight is stored less 1 (Gemma's).
        is_transposed: whether projections are stored [in, out] (GPT-2's).
        fused: parts that are stored as one, in this order.
        positions: name of a table of positions, or none.
        is_parallel: whether attention and MLP read one norm.
    """

    prefix: str = "model."
    layer: str = "layers.{}."
    names: Mapping[str, str]
    embeddings: str = "embed_tokens"
    last_norm: str = "norm"
    norm: str = "rms"
    norm_bias_one: bool = False
    is_transposed: bool = False
    fused: Mapping[str, tuple[str, ...]]
    positions: str | None = None
    is_parallel: bool = False


_LLAMA = {
    "norm": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "queries": "self_attn.q_proj",
    "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "up": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
_GPT2 = {
    "norm": "ln_1",
    "norm2": "ln_2",
    "qkv": "attn.c_attn",
    "output": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_PHI = {
    "norm": "input_layernorm",
    "queries": "self_attn.q_proj",
    "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj",
    "output": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_PHI3 = {
    "norm": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "qkv": "self_attn.qkv_proj",
    "output": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
_PLAIN_LLAMA = Family(names=_LLAMA, fused={})
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), _PLAIN_LLAMA),
    "gemma": Family(names=_LLAMA, fused={}, norm_bias_one=True),
    "phi3": Family(names=_PHI3, fused={"qkv": ("queries", "keys", "values"),
                                       "gate_up": ("gate", "up")}),
    "phi": Family(names=_PHI, fused={}, last_norm="final_layernorm", norm="layer",
                  is_parallel=True),
    "gpt2": Family(
        prefix="transformer.", layer="h.{}.", names=_GPT2, embeddings="wte", last_norm="ln_f",
        norm="layer", is_transposed=True, fused={"qkv": ("queries", "keys", "values")},
        positions="wpe",
    ),
}  # fmt: skip


class TeacherWeights:
    """The folder of a language model, of which a layer at a time is read.

    Args:
        folder: with `config.json` and safetensors.
        config: of the model.

    Raises:
        UserError: if the family is not one that can be copied, or the weights cannot be read.
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        self.folder = folder
        self.config: Any = config
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise UserError(
                f"{folder} is a {config.model_type}, and --init teacher copies "
                f"{', '.join(sorted(FAMILIES))}: leave the option out"
            )
        self.family = family
        self._refuse_what_has_no_place()
        self._files = _files(folder)

    @cached_property
    def attention(self) -> AttentionShape:
        """The shape of its attention."""
        config = self.config
        head_dim = self._or("head_dim", config.hidden_size // config.num_attention_heads)
        frequencies, scale = self._rotation(head_dim)
        first = self.layer(0)
        return AttentionShape(
            num_heads=config.num_attention_heads,
            num_heads_kv=self._or("num_key_value_heads", config.num_attention_heads),
            head_dim=head_dim,
            qkv_proj_bias=first.queries.bias is not None,
            out_proj_bias=first.output.bias is not None,
            softmax_scale=self._or("attention_multiplier", None),
            rotary_frequencies=frequencies,
            rotary_scale=scale,
            qk_norm_epsilon=None if first.query_norm is None else self.norm_epsilon,
            window=self._window(),
        )

    @property
    def num_layers(self) -> int:
        """Of the teacher."""
        return self.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        """Width of its residual stream."""
        return self.config.hidden_size

    @property
    def norm_epsilon(self) -> float:
        """Of every norm."""
        names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
        return next(getattr(self.config, one) for one in names if hasattr(self.config, one))

    @property
    def activation(self) -> str:
        """Of its MLPs, by transformers' name."""
        names = ("hidden_activation", "hidden_act", "activation_function")
        return next(getattr(self.config, one) for one in names if getattr(self.config, one, None))

    def layer(self, index: int) -> TeacherLayer:
        """One layer, in float32."""
        parts = {
            part: self._affine(self.family.layer.format(index) + name, part)
            for part, name in self.family.names.items()
        }
        for whole, names in self.family.fused.items():
            parts |= self._parted(parts.pop(whole), names)
        residual = self._or("residual_multiplier", 1.0)
        output, down = parts["output"], parts["down"]
        assert output is not None and down is not None, "every layer has them"
        needed: dict[str, Any] = {
            one: parts[one] for one in ("norm", "queries", "keys", "values", "up")
        }
        query_norm, key_norm = parts.get("query_norm"), parts.get("key_norm")
        return TeacherLayer(
            **needed,
            norm2=parts.get("norm2"),
            output=output.times(residual),
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            gate=parts.get("gate"),
            down=down.times(residual),
        )

    def embeddings(self) -> Tensor:
        """[V, D], as the residual stream begins with them."""
        factor = self._or("embedding_multiplier", 1.0)
        if self.config.model_type == "gemma":
            factor = math.sqrt(self.d_model)
        return self._tensor(f"{self.family.prefix}{self.family.embeddings}.weight") * factor

    def positions(self) -> Tensor | None:
        """[positions, D], where the teacher has a table of them."""
        if self.family.positions is None:
            return None
        return self._tensor(f"{self.family.prefix}{self.family.positions}.weight")

    def last_norm(self) -> Affine:
        """Before the head."""
        found = self._affine(self.family.last_norm, "norm")
        assert found is not None, "every model has one"
        return found

    def head(self) -> Affine:
        """[V, D], after everything that its logits are multiplied with."""
        name = "lm_head.weight"
        if name not in self._files:
            name = f"{self.family.prefix}{self.family.embeddings}.weight"
        bias = self._tensor("lm_head.bias") if self.has_head_bias else None
        divisor = self._or("logits_scaling", 1.0)
        return Affine(weight=self._tensor(name), bias=bias).times(1 / divisor)

    @property
    def has_head_bias(self) -> bool:
        """Whether something is added to its logits."""
        return "lm_head.bias" in self._files

    @property
    def is_tied(self) -> bool:
        """Whether its head is its table, with no factor between them."""
        plain = self._or("embedding_multiplier", 1.0) == self._or("logits_scaling", 1.0) == 1.0
        return plain and self.config.model_type != "gemma" and "lm_head.weight" not in self._files

    @property
    def sha256(self) -> str:
        """As a cache's manifest has it: names, shapes and float32 bytes, in order of names."""
        aliases = {name: name for name in self._files}
        table = f"{self.family.prefix}{self.family.embeddings}.weight"
        if self.config.tie_word_embeddings:
            aliases["lm_head.weight"] = table
        digest = hashlib.sha256()
        for name, stored in sorted(aliases.items()):
            tensor = self._tensor(stored)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _or(self, name: str, default: Any) -> Any:
        value = getattr(self.config, name, None)
        return default if value is None else value

    def _tensor(self, name: str) -> Tensor:
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name).float()
        except (KeyError, SafetensorError) as error:
            raise UserError(
                f"{self.folder} has no readable {name} ({error}): give the folder of the teacher "
                "that made the cache"
            ) from error

    def _affine(self, name: str, part: str) -> Affine | None:
        """A part, if the layer has it."""
        whole = f"{self.family.prefix}{name}"
        if f"{whole}.weight" not in self._files:
            return None
        weight = self._tensor(f"{whole}.weight")
        bias = self._tensor(f"{whole}.bias") if f"{whole}.bias" in self._files else None
        if "norm" in part:
            return Affine(weight=weight + 1 if self.family.norm_bias_one else weight, bias=bias)
        return Affine(weight=weight.T if self.family.is_transposed else weight, bias=bias)

    def _parted(self, whole: Affine | None, names: tuple[str, ...]) -> dict[str, Affine | None]:
        """What is stored as one, by its parts' names."""
        assert whole is not None, "the family has it"
        num = len(whole.weight)
        sizes = [num // len(names)] * len(names)
        if "keys" in names:
            config = self.config
            head_dim = self._or("head_dim", config.hidden_size // config.num_attention_heads)
            keys = head_dim * self._or("num_key_value_heads", config.num_attention_heads)
            sizes = [head_dim * config.num_attention_heads, keys, keys]
        biases = [None] * len(names) if whole.bias is None else whole.bias.split(sizes)
        weights = whole.weight.split(sizes)
        return {
            name: Affine(weight=weight, bias=bias)
            for name, weight, bias in zip(names, weights, biases, strict=True)
        }

    def _rotation(self, head_dim: int) -> tuple[tuple[float, ...], float]:
        """Radians a position, and the factor of what is turned."""
        if self.family.positions is not None:
            return (), 1.0
        rope = self.config.rope_parameters
        kind = rope.get("rope_type", "default")
        if kind == "default":
            share = rope.get("partial_rotary_factor", self._or("partial_rotary_factor", 1.0))
            width = int(head_dim * share)
            exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
            return tuple((1.0 / (rope["rope_theta"] ** exponents)).tolist()), 1.0
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
        return tuple(frequencies.tolist()), float(scale)

    def _window(self) -> int | None:
        kinds = set(getattr(self.config, "layer_types", None) or ())
        is_windowed = getattr(self.config, "use_sliding_window", True)
        if kinds == {"full_attention"} or not is_windowed:
            return None
        return getattr(self.config, "sliding_window", None)

    def _refuse_what_has_no_place(self) -> None:
        """What a student's layer cannot do."""
        config = self.config
        rope = getattr(config, "rope_parameters", None) or {}
        found: dict[str, Callable[[], bool]] = {
            "positions whose turns depend on the length": lambda: (
                rope.get("rope_type", "default") in ("dynamic", "longrope")
            ),
            "layers of different windows": lambda: (
                len(set(getattr(config, "layer_types", None) or ())) > 1
            ),
            "norms of its queries and keys over the whole width": lambda: bool(
                getattr(config, "qk_layernorm", False)
            ),
            "quantised weights": lambda: hasattr(config, "quantization_config"),
            "attention scaled by its layer": lambda: bool(
                getattr(config, "scale_attn_by_inverse_layer_idx", False)
            ),
        }
        for what, has in found.items():
            if has():
                raise UserError(
                    f"{self.folder} has {what}, which no layer of a student has: leave "
                    "--init teacher out"
                )


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    try:
        if (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            return {name: folder / file for name, file in index.items()}
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no safetensors that can be read ({error}): give the folder of the "
            "teacher that made the cache, saved by save_pretrained"
        ) from error
