"""The Mamba-1 mixer: names, start values, the recurrence written out."""

from __future__ import annotations

import math

import torch

from teacher_cache.stages.student.mixers import Layout, Mamba
from tests.tiny_students import small_mixer, started_mixer


def test_parameters_have_mamba_ssms_names_and_shapes() -> None:
    # mamba_ssm.modules.mamba_simple.Mamba(256, d_state=48, expand=3)
    mixer = started_mixer("mamba")
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "A_log": (768, 48),
        "D": (768,),
        "in_proj.weight": (1536, 256),
        "conv1d.weight": (768, 1, 4),
        "conv1d.bias": (768,),
        "x_proj.weight": (112, 768),
        "dt_proj.weight": (768, 16),
        "dt_proj.bias": (768,),
        "out_proj.weight": (256, 768),
    }


def test_starts_as_mamba_ssm_does() -> None:
    fresh = started_mixer("mamba")
    assert isinstance(fresh, Mamba)
    dt = torch.nn.functional.softplus(fresh.dt_proj.bias)
    assert dt.min() * 1.001 >= 0.001 and dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(0.01)) < 0.2  # uniform in the logarithm
    torch.testing.assert_close(fresh.A_log.exp(), torch.arange(1.0, 49).expand(768, 48))
    assert 0.98 / 4 < fresh.dt_proj.weight.abs().max() <= 1 / 4  # R = 16
    assert (fresh.D == 1).all()
    bound = 1 / math.sqrt(768) / math.sqrt(4)  # torch's own bound over sqrt(layers)
    assert 0.98 * bound < fresh.out_proj.weight.abs().max() <= bound


def test_forward_is_the_recurrence_written_out() -> None:
    module = small_mixer("mamba", dt_rank=2)
    assert isinstance(module, Mamba)
    hidden = torch.randn(2, 11, 8, dtype=torch.float64)
    x, z = module.in_proj(hidden).split((16, 16), dim=-1)
    padded = torch.cat((torch.zeros(2, 3, 16, dtype=torch.float64), x), dim=1)
    windows = padded.unfold(1, 4, 1)  # [2, 11, 16, 4]
    conv = (windows * module.conv1d.weight[:, 0]).sum(-1) + module.get_parameter("conv1d.bias")
    u = torch.nn.functional.silu(conv)
    low_rank, B, C = module.x_proj(u).split((2, 3, 3), dim=-1)
    steps, bias = module.dt_proj(low_rank)
    dt = torch.nn.functional.softplus(steps + bias)  # [2, 11, 16]
    state = torch.zeros(2, 16, 3, dtype=torch.float64)
    outputs = []
    for t in range(11):
        decay = torch.exp(-dt[:, t, :, None] * module.A_log.exp())
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1) + module.D * u[:, t])
    gated = torch.stack(outputs, dim=1) * torch.nn.functional.silu(z)
    torch.testing.assert_close(module(hidden, Layout()), module.out_proj(gated))
