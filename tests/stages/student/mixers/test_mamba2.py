"""The Mamba-2 mixer: names, start values, the recurrence written out."""

from __future__ import annotations

import math

import torch

from teacher_cache.stages.student.mixers import Layout, Mamba2
from tests.reference import ssd_scan_loop
from tests.tiny_students import small_mixer, started_mixer


def test_parameters_have_mamba_ssms_names_and_shapes() -> None:
    # mamba_ssm.modules.mamba2.Mamba2(256, d_state=48, headdim=96, expand=3)
    mixer = started_mixer("mamba2")
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
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
    fresh = started_mixer("mamba2", expand=12, head_dim=4)  # 768 heads
    assert isinstance(fresh, Mamba2) and fresh.norm is not None
    dt = torch.nn.functional.softplus(fresh.dt_bias)
    assert dt.min() * 1.001 >= 0.001 and dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.2  # uniform in the logarithm
    assert fresh.A_log.min() >= 0 and fresh.A_log.exp().max() <= 16.001
    assert abs(fresh.A_log.exp().mean() - 8.5) < 0.7
    assert (fresh.D == 1).all() and (fresh.norm.weight == 1).all()
    bound = 1 / math.sqrt(12 * 256) / math.sqrt(4)  # torch's own bound over sqrt(layers)
    assert 0.98 * bound < fresh.out_proj.weight.abs().max() <= bound


def test_forward_is_the_recurrence_written_out() -> None:
    module = small_mixer("mamba2", ngroups=2)
    assert isinstance(module, Mamba2) and module.norm is not None
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
    groups = gated.unflatten(-1, (2, 8))  # each group of heads is normalised by itself
    normed = (groups * (groups.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2)
    torch.testing.assert_close(
        module(hidden, Layout()), module.out_proj(normed * module.norm.weight)
    )
