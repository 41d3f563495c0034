"""A student whose layers begin as its teacher's.

Norms, MLPs, embeddings and head are copied as they are. A layer that stays attention is copied
whole. Of one that becomes a Mamba-2 mixer, queries become C, keys B, values x, and the output
projection stays (Wang et al. 2024, arXiv:2408.15237, section 3; Bick et al. 2024,
arXiv:2408.10189): with no decay, steps of 1 and no softmax, both compute
`y_t = sum_{s <= t} (q_t . k_s) v_s`. docs/maths.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.stages.student.attention import Attention
from teacher_cache.stages.student.backbone import MambaLayer
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.student.mixers import Mamba2
from teacher_cache.stages.student.teacher_weights import Affine, TeacherLayer, TeacherWeights

SILU_ONE = 1.2784645427610738
"""Where SiLU is 1: the gate's bias, so that a fresh gate lets all through."""


def shape_of(teacher: TeacherWeights) -> dict[str, Any]:
    """The student's sizes, by `MambaStudentConfig`'s names; all but which layers are attention.

    Args:
        teacher: whose layers are to be copied.
    """
    attention = teacher.attention
    first = teacher.layer(0)
    return {
        "d_model": teacher.d_model,
        "num_layers": teacher.num_layers,
        "inner_width": attention.num_heads * attention.head_dim,
        "d_state": attention.head_dim,
        "head_dim": attention.head_dim,
        "ngroups": attention.num_heads,
        "norm": teacher.family.norm,
        "norm_epsilon": teacher.norm_epsilon,
        "d_intermediate": len(first.up.weight),
        "mlp": "plain" if first.gate is None else "gated",
        "mlp_activation": teacher.activation,
        "mlp_bias": first.up.bias is not None,
        "parallel_mlp": teacher.family.is_parallel,
        "proj_bias": True,
        "conv_activation": "none",
        "gated_norm": False,
        "attn_cfg": attention.to_dict(),
        "num_positions": 0 if (table := teacher.positions()) is None else len(table),
        "tie_word_embeddings": teacher.is_tied,
        "head_bias": teacher.has_head_bias,
    }


@torch.no_grad()
def copy_teacher(student: MambaStudentForCausalLM, teacher: TeacherWeights) -> None:
    """Copy all that has a place, a layer at a time; decays, steps and D of mixers stay fresh.

    Rows of the student's table beyond the teacher's stay fresh, too.

    Args:
        student: of `shape_of`'s sizes; changed in place.
        teacher: to be copied.
    """
    backbone = student.backbone
    _put_rows(backbone.embedding.weight, teacher.embeddings())
    table = teacher.positions()
    if table is not None and backbone.positions is not None:
        backbone.positions.weight.copy_(table)
    for index, layer in enumerate(backbone.layers):
        _copy_layer(layer, teacher.layer(index), teacher)  # pyright: ignore[reportArgumentType]
    _put(backbone.norm_f, teacher.last_norm())
    head = teacher.head()
    if not teacher.is_tied:
        _put_rows(student.lm_head.weight, head.weight)
    if head.bias is not None:
        student.lm_head.bias[: len(head.bias)] = head.bias


def _copy_layer(layer: MambaLayer, source: TeacherLayer, teacher: TeacherWeights) -> None:
    _put(layer.norm, source.norm)
    if layer.norm2 is not None and source.norm2 is not None:
        _put(layer.norm2, source.norm2)
    assert layer.mlp is not None, "every teacher has MLPs"
    _put(layer.mlp.fc1, _stacked(source.up, source.gate))
    _put(layer.mlp.fc2, source.down)
    if isinstance(layer.mixer, Attention):
        _copy_attention(layer.mixer, source)
    else:
        assert isinstance(layer.mixer, Mamba2), "the configuration's arch is mamba2"
        _copy_mixer(layer.mixer, source, teacher)


def _copy_attention(mixer: Attention, source: TeacherLayer) -> None:
    _put(mixer.in_proj, _stacked(source.queries, source.keys, source.values))
    _put(mixer.out_proj, source.output)
    if mixer.q_norm is not None and source.query_norm is not None:
        mixer.q_norm.weight.copy_(source.query_norm)
    if mixer.k_norm is not None and source.key_norm is not None:
        mixer.k_norm.weight.copy_(source.key_norm)


def _copy_mixer(mixer: Mamba2, source: TeacherLayer, teacher: TeacherWeights) -> None:
    shape = teacher.attention
    scale = shape.head_dim**-0.5 if shape.softmax_scale is None else shape.softmax_scale
    values, keys = (_for_each_head(one, teacher) for one in (source.values, source.keys))
    inner = shape.num_heads * shape.head_dim
    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    # Order of the projection's outputs: z, x, B, C, dt; what makes the steps stays fresh.
    weight[:inner] = 0
    bias[:inner] = SILU_ONE
    parts = (values, keys, source.queries.times(scale))
    for start, part in zip(range(inner, 4 * inner, inner), parts, strict=True):
        weight[start : start + inner] = part.weight
        bias[start : start + inner] = 0 if part.bias is None else part.bias
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[..., -1] = 1  # each position by itself
    mixer.conv1d.bias.zero_()
    mixer.D.zero_()  # attention has no path around its values
    mixer.out_proj.bias.zero_()
    _put(mixer.out_proj, source.output)


def _for_each_head(part: Affine, teacher: TeacherWeights) -> Affine:
    """Keys or values that several heads of queries share, once for each of them."""
    shape = teacher.attention
    times = shape.num_heads // shape.num_heads_kv

    def repeated(rows: Tensor) -> Tensor:
        heads = rows.unflatten(0, (shape.num_heads_kv, shape.head_dim))
        return heads.repeat_interleave(times, dim=0).flatten(0, 1)

    bias = None if part.bias is None else repeated(part.bias)
    return Affine(weight=repeated(part.weight), bias=bias)


def _stacked(*parts: Affine | None) -> Affine:
    """One projection of several."""
    there = [one for one in parts if one is not None]
    biases: list[Tensor] = [one.bias for one in there if one.bias is not None]
    return Affine(
        weight=torch.cat([one.weight for one in there]),
        bias=torch.cat(biases) if biases else None,
    )


def _put(module: nn.Module, part: Affine) -> None:
    for name, value in _tensors(part):
        getattr(module, name).copy_(value)


def _tensors(part: Affine) -> Iterator[tuple[str, Tensor]]:
    yield "weight", part.weight
    if part.bias is not None:
        yield "bias", part.bias


def _put_rows(table: Tensor, rows: Tensor) -> None:
    num = min(len(table), len(rows))
    table[:num] = rows[:num]
