"""The shape of a student's attention layers, as its configuration holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from teacher_cache.cache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Causal attention of grouped queries; the first names are mamba_ssm's.

    Attributes:
        num_heads: of queries.
        num_heads_kv: of keys and values; divides `num_heads`.
        head_dim: of each.
        qkv_proj_bias: whether the first projection has one.
        out_proj_bias: whether the last has.
        softmax_scale: of the products; the root of 1 / `head_dim` if none.
        rotary_frequencies: radians a position by which each pair of channels is turned; channel i
            is paired with the one half of the turned channels behind it. Channels beyond twice as
            many are not turned.
        rotary_scale: by which what is turned is multiplied (YaRN's; 1 for none).
        qk_norm_epsilon: of RMS norms of each head's queries and keys; none where there are none.
        window: positions that one sees, its own included; none for all before it.
    """

    num_heads: int
    num_heads_kv: int
    head_dim: int
    qkv_proj_bias: bool = False
    out_proj_bias: bool = False
    softmax_scale: float | None = None
    rotary_frequencies: tuple[float, ...] = ()
    rotary_scale: float = 1.0
    qk_norm_epsilon: float | None = None
    window: int | None = None

    @classmethod
    def of_width(cls, d_model: int) -> AttentionShape:
        """Of a fresh student: heads of 64 channels, or as near below as divides the width."""
        head_dim = next(one for one in range(min(64, d_model), 0, -1) if d_model % one == 0)
        turned = head_dim // 2
        return cls(
            num_heads=d_model // head_dim,
            num_heads_kv=d_model // head_dim,
            head_dim=head_dim,
            rotary_frequencies=tuple(10_000 ** -(i / turned) for i in range(turned)),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionShape:
        """As `to_dict` made it.

        Raises:
            UserError: for a name that is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        needed = {"num_heads", "num_heads_kv", "head_dim"}
        if values.keys() - known or needed - values.keys():
            wrong = sorted((values.keys() - known) | (needed - values.keys()))
            raise UserError(
                f"The student's attn_cfg has unknown or missing names ({', '.join(wrong)}): it "
                f"takes {', '.join(sorted(known))}, and needs {', '.join(sorted(needed))}."
            )
        frequencies = tuple(values.get("rotary_frequencies", ()))
        return cls(**{**values, "rotary_frequencies": frequencies})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"rotary_frequencies": list(self.rotary_frequencies)}

    def check(self) -> None:
        """Refuse sizes that do not fit.

        Raises:
            UserError: naming them.
        """
        if min(self.num_heads, self.num_heads_kv, self.head_dim) < 1:
            raise UserError("The student's attention has a size below 1: give whole numbers above.")
        if self.num_heads % self.num_heads_kv:
            raise UserError(
                f"The student's {self.num_heads} heads of attention do not divide into "
                f"{self.num_heads_kv} of keys: choose a num_heads_kv that divides them."
            )
        if 2 * len(self.rotary_frequencies) > self.head_dim:
            raise UserError(
                f"The student's attention turns {2 * len(self.rotary_frequencies)} channels of "
                f"heads that have {self.head_dim}: give at most half as many frequencies."
            )
