"""The student's configuration, as transformers stores it beside the weights."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.stages.student.position_map import PositionMap

ARCHITECTURES = ("mamba2",)
POOLINGS = ("cls", "mean", "last")
HEADS = ("mlp", "linear")
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


@strict
class MambaStudentConfig(PreTrainedConfig):
    """A Mamba student for text classification.

    `num_labels`, `id2label` and `label2id` are transformers' own. The kernels of mamba-ssm want
    `2 * d_inner + 2 * ngroups * d_state + heads` to be a multiple of 8, as it is by default; the
    PyTorch scan does not mind.

    Args:
        arch: the mixer, "mamba2".
        vocab_size: rows of the embedding.
        d_model: width of the residual stream (`hidden_size` is the same).
        num_layers: mixers (`num_hidden_layers` is the same).
        expand: the mixer's inner width is `expand * d_model`.
        d_state: state per head and channel.
        head_dim: channels per head; divides the inner width.
        d_conv: positions that the mixer's convolution sees.
        ngroups: groups of heads that share B and C; divides the number of heads.
        chunk_size: positions per chunk of the scan; changes speed and rounding only.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: no initial step size is below this.
        A_init_range: lowest and highest initial decay rate.
        norm_epsilon: added to the mean square in every norm.
        pooling: "cls" and "last" read the last real position after `position_map`, "mean" the
            mean over all real positions.
        head: "mlp" (norm, linear, GELU, dropout, linear) or "linear" (dropout, linear).
        dropout: in the head, 0 to below 1.
        position_map: `PositionMap.to_dict()`: how a sample's positions are reordered first.
        pad_token_id: what a tokenizer pads with; padding is read from the attention mask alone.

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
    head_dim: int = 96
    d_conv: int = 4
    ngroups: int = 1
    chunk_size: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_init_range: list[float] | tuple[float, ...] = (1.0, 16.0)
    norm_epsilon: float = 1e-5
    pooling: str = "cls"
    head: str = "mlp"
    dropout: float = 0.1
    position_map: dict[str, Any] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the identity where no map is given, then do transformers' part of `__init__`."""
        if self.position_map is None:
            self.position_map = PositionMap().to_dict()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse unknown names and sizes that do not fit; runs at the end of `__init__`."""
        for field, options in (("arch", ARCHITECTURES), ("pooling", POOLINGS), ("head", HEADS)):
            name = getattr(self, field)
            if name not in options:
                raise UserError(
                    f"The student has no {field} {name!r}: {did_you_mean(name, options)}"
                )
        for field in SIZES:
            size = getattr(self, field)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"The student's {field} is {size!r}: give a whole number above 0.")
        self._check_heads()
        self._check_ranges()
        appended = PositionMap.from_dict(self.position_map or {}).token_id
        if appended is not None and not 0 <= appended < self.vocab_size:
            raise UserError(
                f"The student's position map appends token {appended}, but its vocab_size is "
                f"{self.vocab_size}: take both from the same tokenizer."
            )

    def _check_heads(self) -> None:
        inner = self.expand * self.d_model
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

    def _check_ranges(self) -> None:
        low_high = tuple(self.A_init_range)
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
