"""The student's configuration and card, as they lie beside the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.stages.student.attention_shape import AttentionShape
from teacher_cache.stages.student.position_map import PositionMap

ARCHITECTURES = ("mamba", "mamba2")
POOLINGS = ("cls", "mean", "last")
HEADS = ("mlp", "linear")
CHOICES = {
    "arch": ARCHITECTURES,
    "pooling": POOLINGS,
    "head": HEADS,
    "mlp": ("gated", "plain"),
    "mlp_activation": tuple(ACT2FN),
    "norm": ("rms", "layer"),
    "conv_activation": ("silu", "none"),
}
PLAIN: dict[str, Any] = {
    "inner_width": None,
    "d_intermediate": 0,
    "norm": "rms",
    "proj_bias": False,
    "conv_activation": "silu",
    "gated_norm": True,
    "attn_layer_idx": (),
    "num_positions": 0,
    "head_bias": False,
}
"""What a student of Mamba's own layers has."""
SIZES = (
    "vocab_size",
    "d_model",
    "num_layers",
    "expand",
    "d_state",
    "head_dim",
    "d_conv",
    "ngroups",
    "chunk_size",
)

_MODULE = "teacher_cache_student"
_CLASSES = {
    "AutoConfig": "MambaStudentConfig",
    "AutoModel": "MambaStudentModel",
    "AutoModelForCausalLM": "MambaStudentForCausalLM",
    "AutoModelForSequenceClassification": "MambaStudentForSequenceClassification",
}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
}
AUTO_MAP = {auto: f"{_MODULE}.{name}" for auto, name in _CLASSES.items()}
"""Where transformers' Auto classes find the student's, where nothing has imported them."""

_SOURCE = f'''"""This folder's classes, for transformers with trust_remote_code=True."""

from teacher_cache.stages.student import (
    {f",{chr(10)}    ".join(_CLASSES.values())},
)
'''
_CARD = """---
library_name: transformers
tags: [mamba, distillation, teacher-cache]
{pipeline}---

# A distilled Mamba student

{loading}"""
_LOADING = """\
A Mamba student of the package `teacher-cache`, which has its code. Import it first, and every tool
that loads a folder by transformers' Auto classes loads this one:

```python
import teacher_cache.stages.student
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

Without the import, `trust_remote_code=True` has transformers run `{module}.py`, whose only line
imports it.
"""


@strict
class MambaStudentConfig(PreTrainedConfig):
    """A Mamba student: a text classifier or a language model.

    `num_labels`, `id2label` and `label2id` are transformers' own, and so is `tie_word_embeddings`:
    whether a language model's head is its embedding table. The Mamba-2 kernels of mamba-ssm are
    fastest where `2 * d_inner + 2 * ngroups * d_state + heads` is a multiple of 8, as it is by
    default; elsewhere one more copy is made.

    Args:
        arch: the mixer, "mamba" (Mamba-1) or "mamba2".
        vocab_size: rows of the embedding.
        d_model: width of the residual stream (`hidden_size` is the same).
        num_layers: mixers (`num_hidden_layers` is the same).
        expand: the mixer's inner width is `expand * d_model`.
        d_state: state per channel.
        d_conv: positions that the mixer's convolution sees, at least 2.
        bidirectional: whether each mixer also scans the reversed rows, with a convolution and
            state-space parameters of its own; then nothing can be generated.
        dt_rank: rank of Mamba-1's step sizes; a sixteenth of `d_model`, rounded up, if none.
        head_dim: Mamba-2's channels per head; divides the inner width.
        ngroups: Mamba-2's groups of heads that share B and C, and whose outputs are normalised
            together; divides the number of heads.
        chunk_size: positions per chunk of Mamba-2's scan; changes speed and rounding only.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: no initial step size is below this.
        A_init_range: lowest and highest initial decay rate of Mamba-2, or the one of all heads.
        norm_epsilon: added to the mean square in every norm.
        inner_width: the mixers' inner width D; `expand * d_model` if none.
        d_intermediate: width of an MLP behind each mixer; 0 for none.
        mlp: "gated" (as mamba_ssm's: one half times the activation of the other) or "plain".
        mlp_activation: of the MLP, by transformers' name.
        mlp_bias: whether its two projections have one.
        parallel_mlp: whether mixer and MLP read one norm and are added together.
        norm: "rms" or "layer", of the residual stream.
        proj_bias: whether Mamba-2's projections have one.
        conv_activation: what follows Mamba-2's convolution: "silu" or "none".
        gated_norm: whether Mamba-2 normalises what is gated.
        attn_layer_idx: layers whose mixer is attention, counted from 0.
        attn_cfg: `AttentionShape.to_dict()`, of these layers; that of `d_model` if none.
        num_positions: rows of a table of positions that is added to the embeddings; 0 for none.
        head_bias: whether a language model's head has one.
        pooling: "cls" and "last" read the last real position after `position_map`, "mean" the
            mean over all real positions.
        head: "mlp" (norm, linear, GELU, dropout, linear) or "linear" (dropout, linear).
        dropout: in the head, 0 to below 1.
        position_map: `PositionMap.to_dict()`: how a sample's positions are reordered first.
        pad_token_id: what a tokenizer pads with; padding is read from the attention mask alone.
        use_cache: whether a language model returns its state for incremental decoding.

    Raises:
        UserError: if a name is unknown or sizes do not fit.
    """

    model_type = "teacher_cache_mamba"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
    }

    arch: str = "mamba2"
    vocab_size: int = 30522
    d_model: int = 256
    num_layers: int = 4
    expand: int = 3
    d_state: int = 48
    d_conv: int = 4
    bidirectional: bool = False
    dt_rank: int | None = None
    head_dim: int = 96
    ngroups: int = 1
    chunk_size: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_init_range: float | list[float] | tuple[float, ...] = (1.0, 16.0)
    norm_epsilon: float = 1e-5
    inner_width: int | None = None
    d_intermediate: int = 0
    mlp: str = "gated"
    mlp_activation: str = "silu"
    mlp_bias: bool = False
    parallel_mlp: bool = False
    norm: str = "rms"
    proj_bias: bool = False
    conv_activation: str = "silu"
    gated_norm: bool = True
    attn_layer_idx: list[int] | tuple[int, ...] = ()
    attn_cfg: dict[str, Any] | None = None
    num_positions: int = 0
    head_bias: bool = False
    pooling: str = "cls"
    head: str = "mlp"
    dropout: float = 0.1
    position_map: dict[str, Any] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing, as for the models."""

    @property
    def d_inner(self) -> int:
        """The mixers' inner width D."""
        return self.inner_width or self.expand * self.d_model

    @property
    def attention(self) -> AttentionShape | None:
        """Of the attention layers, if there are any."""
        return AttentionShape.from_dict(self.attn_cfg or {}) if self.attn_layer_idx else None

    @property
    def num_residuals(self) -> int:
        """How many projections add to one residual stream."""
        return self.num_layers * (2 if self.d_intermediate else 1)

    @property
    def beyond_mamba(self) -> list[str]:
        """Names of the fields by which it is more than Mamba's own layers of norm and mixer."""
        return [name for name, plain in PLAIN.items() if getattr(self, name) != plain]

    @property
    def resolved_dt_rank(self) -> int:
        """R, the rank of Mamba-1's step sizes."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def initial_decay_rates(self) -> tuple[float, ...]:
        """`A_init_range` as lowest and highest."""
        rates = self.A_init_range
        return (rates, rates) if isinstance(rates, float | int) else tuple(rates)

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches keep for each layer: states, or keys and values."""
        return [
            "full_attention" if layer in self.attn_layer_idx else "linear_attention"
            for layer in range(self.num_layers)
        ]

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the identity where no map is given, then do transformers' part of `__init__`."""
        if self.position_map is None:
            self.position_map = PositionMap().to_dict()
        if self.attn_layer_idx and self.attn_cfg is None:
            self.attn_cfg = AttentionShape.of_width(self.d_model).to_dict()
        if self.num_positions:  # where transformers' tools look for the longest text
            self.max_position_embeddings = self.num_positions
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse unknown names and sizes that do not fit; runs at the end of `__init__`."""
        for field, options in CHOICES.items():
            name = getattr(self, field)
            if name not in options:
                raise UserError(
                    f"The student has no {field} {name!r}: {did_you_mean(name, options)}"
                )
        for field in SIZES:
            size = getattr(self, field)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"The student's {field} is {size!r}: give a whole number above 0.")
        if self.d_conv < 2:
            raise UserError(f"The student's d_conv is {self.d_conv}: give 2 or more.")
        if self.dt_rank is not None and self.dt_rank < 1:
            raise UserError(f"The student's dt_rank is {self.dt_rank}: give 1 or more, or none.")
        self.attn_layer_idx = tuple(self.attn_layer_idx)
        if self.arch == "mamba2":
            self._check_heads()
        self._check_blocks()
        self._check_ranges()
        appended = PositionMap.from_dict(self.position_map or {}).token_id
        if appended is not None and not 0 <= appended < self.vocab_size:
            raise UserError(
                f"The student's position map appends token {appended}, but its vocab_size is "
                f"{self.vocab_size}: take both from the same tokenizer."
            )

    def _check_heads(self) -> None:
        inner = self.d_inner
        if inner % self.head_dim:
            fitting = max(size for size in range(1, self.head_dim) if inner % size == 0)
            raise UserError(
                f"The student's head_dim {self.head_dim} does not divide its inner width "
                f"expand * d_model = {inner}: choose {fitting}, say."
            )
        if (inner // self.head_dim) % self.ngroups:
            raise UserError(
                f"The student's {inner // self.head_dim} heads do not divide into {self.ngroups} "
                "groups: choose an ngroups that divides them."
            )

    def _check_blocks(self) -> None:
        """What surrounds and replaces mixers."""
        if self.arch == "mamba":
            for name in ("proj_bias", "conv_activation", "gated_norm"):
                if getattr(self, name) != PLAIN[name]:
                    raise UserError(f"The student's {name} is of arch mamba2, and it is mamba.")
        beyond = [one for one in self.attn_layer_idx if not 0 <= one < self.num_layers]
        if beyond:
            raise UserError(
                f"The student's attn_layer_idx names layer {beyond[0]}, and it has "
                f"{self.num_layers}, 0 to {self.num_layers - 1}: name one of these."
            )
        if self.attn_layer_idx and self.bidirectional:
            raise UserError(
                "The student's attention layers read forwards, and it is bidirectional: leave one "
                "of the two out."
            )
        if self.attention is not None:
            self.attention.check()

    def _check_ranges(self) -> None:
        low_high = self.initial_decay_rates
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            raise UserError(
                f"The student's A_init_range is {list(low_high)}: give a lowest and a highest "
                "decay rate, both above 0."
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise UserError(
                f"The student's step sizes go from {self.dt_min} to {self.dt_max}: give "
                "0 < dt_min <= dt_max."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"The student's dropout is {self.dropout}: give 0 to below 1.")


def describe_folder(folder: Path, kind: str) -> None:
    """Write what a saved student needs besides its weights; a card that is there is kept.

    Args:
        folder: with the saved model.
        kind: name of the model's class.

    Raises:
        UserError: where the file system refuses.
    """
    write_bytes_atomically(folder / f"{_MODULE}.py", _SOURCE.encode())
    card = folder / "README.md"
    if card.exists():
        return
    pipeline = _PIPELINES.get(_auto_of(kind))
    pipeline = f"pipeline_tag: {pipeline}\n" if pipeline else ""
    text = _CARD.format(pipeline=pipeline, loading=how_to_load(kind))
    write_bytes_atomically(card, text.encode())


def how_to_load(kind: str) -> str:
    """What a student's card says of loading it.

    Args:
        kind: name of the model's class.
    """
    return _LOADING.format(auto=_auto_of(kind), module=_MODULE)


def _auto_of(kind: str) -> str:
    return next((auto for auto, name in _CLASSES.items() if name == kind), "AutoModel")
