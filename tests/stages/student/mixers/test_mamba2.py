"""The Mamba-2 mixer and its convolution: names, start values, causality, resets."""

from __future__ import annotations

import math
from typing import Any

import torch

from teacher_cache.stages.student.mixers.convolution import causal_conv
from teacher_cache.stages.student.mixers.mamba2 import Mamba2
from tests.reference import ssd_scan_loop


def mixer(**changes: Any) -> Mamba2:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "expand": 3,
        "d_state": 48,
        "head_dim": 96,
        "d_conv": 4,
        "ngroups": 1,
        "chunk_size": 64,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_floor": 1e-4,
        "A_init_range": (1.0, 16.0),
        "norm_epsilon": 1e-5,
        "num_residuals": 4,
    }
    return Mamba2(changes.pop("d_model", 256), **(settings | changes))


def small_mixer(**changes: Any) -> Mamba2:
    sizes: dict[str, Any] = {
        "d_model": 8,
        "expand": 2,
        "d_state": 3,
        "head_dim": 4,
        "chunk_size": 16,
    }
    return mixer(**(sizes | changes)).double()


def test_parameters_have_mamba_ssms_names_and_shapes() -> None:
    # mamba_ssm.modules.mamba2.Mamba2(256, d_state=48, headdim=96, expand=3)
    assert {name: tuple(p.shape) for name, p in mixer().named_parameters()} == {
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "in_proj.weight": (1640, 256),
        "conv1d.weight": (864, 1, 4),
        "conv1d.bias": (864,),
        "norm.weight": (768,),
        "out_proj.weight": (256, 768),
    }


def test_starts_as_mamba_ssm_does() -> None:
    fresh = mixer(expand=12, head_dim=4)  # 768 heads
    dt = torch.nn.functional.softplus(fresh.dt_bias)
    assert dt.min() * 1.001 >= 0.001 and dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.2  # uniform in the logarithm
    assert fresh.A_log.min() >= 0 and fresh.A_log.exp().max() <= 16.001
    assert abs(fresh.A_log.exp().mean() - 8.5) < 0.7
    assert (fresh.D == 1).all() and (fresh.norm.weight == 1).all()
    bound = 1 / math.sqrt(12 * 256) / math.sqrt(4)  # torch's own bound over sqrt(layers)
    assert 0.98 * bound < fresh.out_proj.weight.abs().max() <= bound


def test_forward_is_the_recurrence_written_out() -> None:
    module = small_mixer(ngroups=2)
    hidden = torch.randn(2, 11, 8, dtype=torch.float64)
    z, xBC, dt = module.in_proj(hidden).split((16, 16 + 12, 4), dim=-1)
    padded = torch.cat((torch.zeros(2, 3, 28, dtype=torch.float64), xBC), dim=1)
    taps = module.conv1d.weight[:, 0]
    windows = padded.unfold(1, 4, 1)  # [2, 11, 28, 4]
    conv = (windows * taps).sum(-1) + module.get_parameter("conv1d.bias")
    x, B, C = torch.nn.functional.silu(conv).split((16, 6, 6), dim=-1)
    y = ssd_scan_loop(
        x.unflatten(-1, (4, 4)),
        torch.nn.functional.softplus(dt + module.dt_bias),
        -module.A_log.exp(),
        B.unflatten(-1, (2, 3)),
        C.unflatten(-1, (2, 3)),
        D=module.D,
    )
    gated = y.flatten(-2) * torch.nn.functional.silu(z)
    normed = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * module.norm.weight
    torch.testing.assert_close(module(hidden), module.out_proj(normed))


def test_a_position_sees_nothing_after_itself() -> None:
    module = small_mixer()
    hidden = torch.randn(1, 40, 8, dtype=torch.float64)
    changed = hidden.clone()
    changed[:, 25:] += 1
    before, after = module(hidden), module(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-14)
    assert (before[:, 25:] != after[:, 25:]).any(dim=-1).all()


def test_packed_samples_equal_samples_alone_with_gradients() -> None:
    module = small_mixer()
    hidden = torch.randn(1, 43, 8, dtype=torch.float64)
    borders = ((0, 2), (2, 21), (21, 22), (22, 43))  # shorter and longer than the convolution
    seq_idx = torch.cat(
        [torch.full((end - start,), i % 2) for i, (start, end) in enumerate(borders)]
    )
    packed = module(hidden, seq_idx[None])
    alone = torch.cat([module(hidden[:, start:end]) for start, end in borders], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    weight = torch.randn_like(packed)
    parameters = list(module.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((packed * weight).sum(), parameters),
        torch.autograd.grad((alone * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_convolution_equals_conv1d_for_any_length() -> None:
    weight, bias = torch.randn(6, 1, 4), torch.randn(6)
    for length in (1, 2, 3, 4, 20):
        x = torch.randn(2, length, 6)
        padded = torch.nn.functional.pad(x.mT, (3, 0))
        expected = torch.nn.functional.conv1d(padded, weight, bias, groups=6).mT
        one_segment = torch.zeros(2, length, dtype=torch.long)
        for seq_idx in (None, one_segment):
            got = causal_conv(x, weight, bias, seq_idx)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    without = causal_conv(x, weight, None, None) + bias
    torch.testing.assert_close(without, expected, rtol=0, atol=1e-5)
