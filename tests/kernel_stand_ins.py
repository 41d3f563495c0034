"""Slow, obvious stand-ins for the CUDA libraries' functions, with their layouts and refusals.

They run on CPU tensors and raise ValueError where the library would refuse or, worse, would read
what it must not. The checks, and where mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0 make them:

selective_scan_fn, csrc/selective_scan/selective_scan.cpp:
    235  u is float32, float16 or bfloat16           264-265  u, delta [batch, dim, length]
    236  A is float32 (or complex)                   266  A [dim, N]
    242-244  delta, B and C have u's dtype           270, 276  B, C [batch, groups, N, length]
    262  N <= 256                                    282, 285, 290, 293  D, delta_bias float32 [dim]
    Strides of the last dimension are mended by selective_scan_interface.py:28-37.

causal_conv1d_fn, csrc/causal_conv1d.cpp:
    160-161  dtypes of x and weight                  175  positions or channels contiguous
    172-173  x [batch, dim, length], weight [dim, width]
    176-181  channels last: dim and both other strides multiples of 8; 295-303 the same for the
             gradient
    182  width 2 to 4                                186, 189  bias has weight's dtype, [dim]
    193-198  seq_idx: channels last, int32, contiguous, [batch, length]
    Unchecked: csrc/causal_conv1d_fwd.cu:249 and causal_conv1d_bwd.cu load 16 bytes at a time.

mamba_chunk_scan_combined, mamba_ssm/ops/triton/ssd_combined.py:
    346-357  shapes;  Triton's `dot` multiplies matrices of one dtype only;
    seq_idx values are compared for equality (ssd_chunk_scan.py:113, ssd_state_passing.py:78).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the library would refuse: {what}")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """u, delta [batch, dim, length]; A [dim, N]; B, C [batch, N, length]; D, delta_bias [dim]."""
    (batch, dim, length), states = u.shape, A.shape[1]
    require(u.dtype in DTYPES, "u's dtype")
    require(all(tensor.dtype == u.dtype for tensor in (delta, B, C)), "another dtype than u's")
    require(delta.shape == u.shape and A.shape[0] == dim and states <= 256, "shapes of delta, A")
    require(B.shape == C.shape == (batch, states, length), "shapes of B, C")
    assert D is not None and delta_bias is not None and delta_softplus and z is None
    for parameter in (A, D, delta_bias):
        require(parameter.dtype == torch.float32 and parameter.shape[0] == dim, "a parameter")

    x, B, C = u.float(), B.float(), C.float()
    dt = F.softplus(delta.float() + delta_bias[:, None])
    state, outputs = x.new_zeros(batch, dim, states), []
    for t in range(length):
        decay = torch.exp(dt[:, :, t, None] * A)
        state = decay * state + (dt[:, :, t] * x[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1) + D * x[:, :, t])
    y = torch.stack(outputs, dim=2).to(u.dtype)
    return (y, state) if return_last_state else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [batch, dim, length]; weight [dim, width]; bias [dim]; seq_idx [batch, length]."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    require(x.dtype in DTYPES and weight.dtype in DTYPES, "dtypes of x, weight")
    require(weight.shape == (dim, width) and 2 <= width <= 4, "the weight's shape")
    require(bias is None or (bias.dtype == weight.dtype and bias.shape == (dim,)), "the bias")
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    require(channels_last or x.stride(2) == 1, "neither channels nor positions contiguous")
    if channels_last:
        require_channels_last(x)
    if seq_idx is not None:
        require(channels_last, "resets without channels last")
        require(seq_idx.dtype == torch.int32 and seq_idx.is_contiguous(), "seq_idx's layout")
        require(seq_idx.shape == (batch, length), "seq_idx's shape")
    assert initial_states is None and not return_final_states and final_states_out is None
    assert activation == "silu"

    taps = weight.float()
    outputs = []
    for t in range(length):
        y = x.new_zeros(batch, dim, dtype=torch.float32)
        y = y if bias is None else y + bias.float()
        for distance in range(min(width, t + 1)):
            term = taps[:, width - 1 - distance] * x[:, :, t - distance].float()
            if seq_idx is not None:
                term = term * (seq_idx[:, t - distance] == seq_idx[:, t])[:, None]
            y = y + term
        outputs.append(F.silu(y))
    out = torch.stack(outputs, dim=2).to(x.dtype)
    if channels_last and out.requires_grad:
        out.register_hook(require_channels_last)
    return out


def require_channels_last(x: Tensor) -> None:
    """What the convolution needs of x, and of the gradient of its output: [batch, dim, length]."""
    require(x.shape[1] % 8 == 0, "channels no multiple of 8")
    require(x.stride(1) == 1, "a gradient whose channels are not contiguous")
    require(x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, "strides no multiple of 8")
    require(x.data_ptr() % 16 == 0, "(no check, a misaligned load) the first element's place")


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """x [batch, length, H, P]; dt [batch, length, H]; A, D, dt_bias [H]; B, C [.., .., G, N]."""
    batch, length, heads, _ = x.shape
    groups, states = B.shape[2:]
    require(dt.shape == (batch, length, heads) and A.shape == (heads,), "shapes of dt, A")
    require(B.shape == C.shape == (batch, length, groups, states), "shapes of B, C")
    require(B.dtype == C.dtype == x.dtype, "matrices of several dtypes")
    require(heads % groups == 0, "groups")
    require(seq_idx is None or seq_idx.shape == (batch, length), "seq_idx's shape")
    assert D is not None and dt_bias is not None and dt_softplus
    assert z is None and initial_states is None and cu_seqlens is None and dt_limit[0] == 0

    step = F.softplus(dt.float() + dt_bias.float())
    B, C = (tensor.float().repeat_interleave(heads // groups, dim=2) for tensor in (B, C))
    seq_idx = torch.zeros(batch, length) if seq_idx is None else seq_idx
    same = seq_idx[:, :, None] == seq_idx[:, None]  # [batch, i, j]
    sums = (step * A.float()).cumsum(1)
    exponent = (sums[:, :, None] - sums[:, None]).clamp(max=0)  # [batch, i, j, H]
    seen = same[..., None] * torch.ones(length, length).tril()[..., None]
    weights = torch.exp(exponent) * seen * step[:, None]
    y = torch.einsum("bijh,bihn,bjhn,bjhp->bihp", weights, C, B, x.float())
    y = y + D.float()[:, None] * x.float()
    final = torch.einsum("bjh,bjhn,bjhp->bhpn", weights[:, -1], B, x.float())
    y = y.to(x.dtype)
    return (y, final) if return_final_states else y


def rmsnorm_fn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The small Triton kernel that is launched to see whether Triton works."""
    return x * weight


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where the libraries would be."""
    contents = {
        "mamba_ssm": {"__version__": "2.3.2"},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": mamba_chunk_scan_combined
        },
        "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "causal_conv1d": {"__version__": "1.7.0", "causal_conv1d_fn": causal_conv1d_fn},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
