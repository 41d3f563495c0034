"""Attention as a student's mixer: what a layer of its teacher does, kept as it is.

Its states are the keys and values of all earlier positions, so a student that has such layers
remembers at a price that grows with the text. Names of parameters are those of mamba_ssm's `MHA`.

Letters in shape comments: B batch, S positions of a call, K positions that it can see, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from teacher_cache.stages.student.attention_shape import AttentionShape
from teacher_cache.stages.student.norms import RMSNorm


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Where the positions of a batch stand in their documents, and what each can see.

    Attributes:
        positions: [B, S] int64, counted from 0 in each document.
        visible: [B, K] bool, what a later call of the same rows can still see.
        allowed: [B, 1, S, K] bool; none where each position sees all before it.
        rotation: cosine and sine [B, 1, S, R], of R turned channels; none where none are.
    """

    positions: Tensor
    visible: Tensor
    allowed: Tensor | None
    rotation: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        shape: AttentionShape | None,
        size: torch.Size,
        *,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        earlier: Tensor | None,
        device: torch.device,
    ) -> Sight:
        """Of the rows of one call.

        Args:
            shape: of the attention layers, or none where a table of positions is all that asks.
            size: B and S.
            mask: [B, S] bool, False at padding; or none.
            seq_idx: [B, S] integers that number the documents of a row; or none.
            earlier: [B, K'] bool, `visible` of the call before; or none.
            device: of the rows.
        """
        real = torch.ones(size, dtype=torch.bool, device=device) if mask is None else mask
        if earlier is None:
            earlier = real[:, :0]
        numbers = torch.zeros(size, dtype=torch.int64, device=device)
        if seq_idx is not None:
            numbers = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)
        goes_on = numbers == 0  # with the document of the call before
        positions = _ranks(real, numbers) + goes_on * earlier.sum(1, keepdim=True)
        last = numbers.gather(1, (real * torch.arange(size[1], device=device)).amax(1, True))
        visible = torch.cat([earlier & (last == 0), real & (numbers == last)], dim=1)
        is_plain = mask is None and seq_idx is None and not earlier.shape[1]
        is_plain = is_plain and (shape is None or shape.window is None)
        allowed = None
        if not is_plain:
            allowed = _allowed(real, numbers, goes_on, earlier, positions, shape)
        return cls(
            positions=positions,
            visible=visible,
            allowed=allowed,
            rotation=None if shape is None else _rotation(shape, positions),
        )

    def to(self, device: torch.device | str | int, **how: Any) -> Sight:
        """On another device."""
        turned = self.rotation
        return Sight(
            positions=self.positions.to(device, **how),
            visible=self.visible.to(device, **how),
            allowed=None if self.allowed is None else self.allowed.to(device, **how),
            rotation=None if turned is None else (turned[0].to(device), turned[1].to(device)),
        )


def _ranks(real: Tensor, numbers: Tensor) -> Tensor:
    """The place of each real position among those of its document, [B, S]."""
    count = real.cumsum(1)
    begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    # By document, how many stand before it. No cumulated maximum: ONNX has none.
    before = torch.zeros_like(count).scatter_add(1, numbers, begins * (count - real.long()))
    return (count - 1 - before.gather(1, numbers)).clamp(min=0)


def _allowed(
    real: Tensor,
    numbers: Tensor,
    goes_on: Tensor,
    earlier: Tensor,
    positions: Tensor,
    shape: AttentionShape | None,
) -> Tensor:
    """[B, 1, S, K]: real positions of the same document up to one's own, as far as its window."""
    size = real.shape[1]
    order = torch.arange(size, device=real.device)
    own = (numbers[:, :, None] == numbers[:, None]) & (order <= order[:, None]) & real[:, None]
    before = goes_on[:, :, None] & earlier[:, None]
    allowed = torch.cat([before, own], dim=2)
    if shape is not None and shape.window is not None:
        places = torch.cat([earlier.cumsum(1) - 1, positions], dim=1)  # of what is still visible
        allowed = allowed & (positions[:, :, None] - places[:, None] < shape.window)
    # Padding sees itself, since a softmax over nothing is no number.
    itself = F.pad(torch.eye(size, dtype=torch.bool, device=real.device), (earlier.shape[1], 0))
    return (allowed | itself)[:, None]


def _rotation(shape: AttentionShape, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    if not shape.rotary_frequencies:
        return None
    frequencies = torch.tensor(shape.rotary_frequencies, device=positions.device)  # float32
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * shape.rotary_scale, angles.sin() * shape.rotary_scale


class KeysAndValues:
    """Those of one layer, of all calls so far.

    Args:
        cache: of the whole model, with an attention layer at `layer_idx`.
        layer_idx: of the layer.
    """

    def __init__(self, cache: Cache, layer_idx: int):
        self._cache = cache
        self._layer_idx = layer_idx

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """With these [B, H, S, P] behind the earlier ones, [B, H, K, P] each."""
        return self._cache.update(keys, values, self._layer_idx)


class Attention(nn.Module):
    """Causal attention of grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    Positions are turned as Su et al. 2021, arXiv:2104.09864, in halves.

    Args:
        shape: of its heads.
        d_model: of the residual stream.
    """

    def __init__(self, shape: AttentionShape, d_model: int) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.num_heads * shape.head_dim, shape.num_heads_kv * shape.head_dim
        # Order of the projection's outputs: queries, keys, values.
        self.widths = (queries, keys, keys)
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=shape.qkv_proj_bias)
        self.out_proj = nn.Linear(queries, d_model, bias=shape.out_proj_bias)
        self.q_norm = self.k_norm = None
        if shape.qk_norm_epsilon is not None:
            self.q_norm = RMSNorm(shape.head_dim, epsilon=shape.qk_norm_epsilon)
            self.k_norm = RMSNorm(shape.head_dim, epsilon=shape.qk_norm_epsilon)

    def forward(self, hidden: Tensor, sight: Sight, state: KeysAndValues | None = None) -> Tensor:
        """Mix along the sequence.

        Args:
            hidden: [B, S, d_model].
            sight: of the rows.
            state: of incremental decoding, or none.

        Returns:
            [B, S, d_model].
        """
        queries, keys, values = (
            one.unflatten(-1, (-1, self.shape.head_dim))
            for one in self.in_proj(hidden).split(self.widths, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = (one.transpose(1, 2) for one in (queries, keys, values))
        if sight.rotation is not None:
            queries, keys = _turned(queries, sight.rotation), _turned(keys, sight.rotation)
        if state is not None:
            keys, values = state.extended(keys, values)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=sight.allowed,
            is_causal=sight.allowed is None,
            scale=self.shape.softmax_scale,
            enable_gqa=self.shape.num_heads != self.shape.num_heads_kv,
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))


def _turned(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """[B, H, S, P] with its first channels turned by their positions."""
    cosine, sine = rotation
    width = cosine.shape[-1]
    dtype = torch.promote_types(heads.dtype, cosine.dtype)
    turned, rest = heads[..., :width].to(dtype), heads[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned.to(heads.dtype), rest], dim=-1)
