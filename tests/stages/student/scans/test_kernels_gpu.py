"""The CUDA kernels against our scans in float64, on a GPU: outputs and gradients.

    .venv/bin/python -m pytest -m gpu -s tests/stages/student/scans/test_kernels_gpu.py

The first run compiles Mamba-2's Triton kernels in many block sizes and takes minutes.

Tolerances are relative to a result's norm, in units of what the arithmetic rounds to: 2^-8 for
bfloat16, 2^-11 for float16. Mamba-2's kernel also multiplies float32 matrices in TF32, which rounds
factors to 2^-11. Mamba-1's and the convolution compute in float32 whatever the inputs' dtype.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacher_cache.stages.student.scans import dispatch, kernels
from teacher_cache.stages.student.scans.kernels import CONVOLUTION, SELECTIVE, SSD, Kernel
from tests.scan_calls import assert_close, normal, scan_results, selective_inputs, ssd_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed"),
]
DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
LENGTHS = (1, 2, 7, 63, 64, 65, 200, 256, 600)
D_INNER, STATES, BATCH = 768, 48, 3  # d_model 256, expand 3, d_state 48


def must_find(kernel: Kernel, dtype: torch.dtype) -> None:
    """Skip where this GPU cannot run the kernel in this dtype; fail where it should but fails."""
    tensor = torch.zeros(1, device=DEVICE, dtype=dtype)
    reason = dispatch.objection(kernel, dispatch.call_on(tensor, None))
    if reason is not None:
        pytest.skip(reason)
    function, note = kernels.find(kernel, tensor)
    assert function is not None, note


def resets(length: int) -> Tensor:
    """[BATCH, length]: samples of about 20 positions, numbered 3 and 4 in turns."""
    generator = torch.Generator().manual_seed(length)
    return 3 + (torch.rand(BATCH, length, generator=generator) < 0.05).cumsum(1) % 2


def on_device(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE, dtype) for name, tensor in inputs.items()}


def check_scan(scan: Any, inputs: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    """The kernel's results against our scan's on the same numbers in float64."""
    got = scan_results(scan, on_device(inputs), **options)
    expected = scan_results(scan, on_device(inputs, torch.float64), **options)
    assert expected["y"].dtype == torch.float64  # no kernel has that: this was PyTorch
    assert_close(got, expected, tolerance)


def test_which_versions_run(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}", end="")
        print(f", triton {version('triton')}, Python {sys.version.split()[0]}")
        for kernel in (SSD, SELECTIVE, CONVOLUTION):
            function, note = kernels.find(kernel, torch.zeros(1, device=DEVICE))
            print(f"{kernel.function}: {note if function else f'none, {note}'}")


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("head_dim", [96, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mamba2(dtype: torch.dtype, head_dim: int, packed: bool) -> None:
    must_find(SSD, dtype)
    for length in LENGTHS:
        inputs = ssd_inputs(BATCH, length, D_INNER // head_dim, head_dim, 1, STATES, dtype)
        seq_idx = resets(length).to(DEVICE) if packed else None
        # Products of rounded matrices, each result of up to three in a row.
        tolerance = 4 * max(ROUNDING[dtype], 2**-11)
        check_scan(dispatch.ssd, inputs, tolerance, seq_idx=seq_idx, chunk_size=64)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mamba1(dtype: torch.dtype, packed: bool) -> None:
    must_find(SELECTIVE, dtype)
    for length in LENGTHS:
        inputs = selective_inputs(BATCH, length, D_INNER, STATES, dtype)
        seq_idx = resets(length).to(DEVICE) if packed else None
        # float32 with fast exponentials: an error of an ulp or two in each of hundreds of decays
        # that one state goes through, 1e-4 at most. 16 bits: results are rounded once.
        tolerance = 1e-4 + 2 * ROUNDING[dtype]
        check_scan(dispatch.selective, inputs, tolerance, seq_idx=seq_idx)


@pytest.mark.skipif(find_spec("causal_conv1d") is None, reason="causal-conv1d is not installed")
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("heads", [8, 12, 16])  # 12: strides that the kernel refuses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_of_a_slice_of_the_projection(
    dtype: torch.dtype, heads: int, packed: bool
) -> None:
    must_find(CONVOLUTION, dtype)
    channels = D_INNER + 2 * STATES
    for length in LENGTHS:
        projected = normal(BATCH, length, D_INNER + channels + heads, dtype=dtype)
        weight = normal(channels, 1, 4, seed=1) / 2
        results = []
        for kind in (dtype, torch.float64):
            wide = torch.promote_types(kind, torch.float32)
            leaves = [
                projected.to(DEVICE, kind).requires_grad_(),
                weight.to(DEVICE, wide).requires_grad_(),
                normal(channels, seed=2).to(DEVICE, wide).requires_grad_(),
            ]
            seq_idx = resets(length).to(DEVICE) if packed else None
            x = leaves[0][..., D_INNER : D_INNER + channels]
            y = dispatch.convolve(x, leaves[1], leaves[2], seq_idx=seq_idx)
            grad = normal(*y.shape, seed=3, dtype=dtype).to(DEVICE, kind)
            names = ("x", "weight", "bias")
            grads = torch.autograd.grad(y, leaves, grad)
            results.append({"y": y.detach()} | dict(zip(names, grads, strict=True)))
        # Four terms in float32 and a fast exponential; 16 bits: results are rounded once.
        assert_close(results[0], results[1], 1e-5 + 2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    """Sequences come out of linear layers in 16 bits, parameters are float32, both train."""
    for kernel in (SSD, SELECTIVE, CONVOLUTION):
        must_find(kernel, dtype)
    torch.manual_seed(0)
    layer = nn.Linear(64, 96 + 2 * STATES + 2, device=DEVICE)
    weight = normal(96 + 2 * STATES, 1, 4).to(DEVICE).requires_grad_()
    A_log, D, dt_bias = (torch.zeros(2, device=DEVICE, requires_grad=True) for _ in range(3))
    seq_idx = resets(200).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        xBC, dt = layer(normal(BATCH, 200, 64).to(DEVICE)).split((96 + 2 * STATES, 2), dim=-1)
        xBC = dispatch.convolve(xBC, weight, None, seq_idx=seq_idx)
        x, B, C = xBC.split((96, STATES, STATES), dim=-1)
        ssd = dispatch.ssd(
            *(x.unflatten(-1, (2, 48)), dt, -A_log.exp(), B.unsqueeze(2), C.unsqueeze(2)),
            D=D,
            dt_bias=dt_bias,
            seq_idx=seq_idx,
            chunk_size=64,
        )
        A = -A_log.exp().repeat(48)[:, None].expand(96, STATES)
        selective = dispatch.selective(
            *(x, x, A, B, C), D=D.repeat(48), dt_bias=dt_bias.repeat(48), seq_idx=seq_idx
        )
    assert xBC.dtype == ssd.y.dtype == selective.y.dtype == dtype
    (ssd.y.float().square().mean() + selective.y.float().square().mean()).backward()
    for leaf in (layer.weight, layer.bias, weight, A_log, D, dt_bias):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()
