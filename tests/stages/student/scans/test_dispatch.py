"""Who computes a call: the choice as a table, and each path taken, with stand-ins for kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacher_cache.stages.student.scans import dispatch, kernels
from teacher_cache.stages.student.scans.dispatch import Call, objection
from teacher_cache.stages.student.scans.kernels import CONVOLUTION, SELECTIVE, SSD, Kernel
from tests import kernel_stand_ins as stand_ins
from tests.scan_calls import normal

H100 = Call(is_cuda=True, device="cuda:0", capability=(9, 0), dtype=torch.bfloat16, limit=None)
P100 = replace(H100, capability=(6, 0), dtype=torch.float16)
T4 = replace(H100, capability=(7, 5), dtype=torch.float16)
CPU = Call(is_cuda=False, device="cpu", capability=(0, 0), dtype=torch.float32, limit=None)
LENGTH = 19
SEQ_IDX = torch.tensor([[5] * 4 + [6] * 3 + [5] * 12, [2] * LENGTH])


@pytest.mark.parametrize(
    ("kernel", "call", "expected"),
    [
        (SSD, H100, None),
        (SELECTIVE, H100, None),
        (CONVOLUTION, H100, None),
        (SSD, replace(H100, dtype=torch.float32), None),
        (SSD, CPU, "tensors are on cpu"),
        (SSD, replace(CPU, limit="chunk_size 7"), "tensors are on cpu"),  # the first reason
        (SSD, P100, "compute capability 6.0, the kernel needs 7.0 for float16"),
        (SELECTIVE, P100, None),  # its first launch decides
        (SSD, T4, None),
        (
            SSD,
            replace(T4, dtype=torch.bfloat16),
            "compute capability 7.5, the kernel needs 8.0 for bfloat16",
        ),
        (SSD, replace(H100, dtype=torch.float64), "no kernel for float64"),
        (CONVOLUTION, replace(H100, limit="width 5 is not 2, 3 or 4"), "width 5 is not 2, 3 or 4"),
    ],
)
def test_choice(kernel: Kernel, call: Call, expected: str | None) -> None:
    assert objection(kernel, call) == expected


def test_call_on_a_cpu_tensor() -> None:
    assert dispatch.call_on(torch.zeros(1), None) == CPU


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels called from here on; the libraries are there and nothing is known of them."""
    stand_ins.install(monkeypatch)
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(dispatch, "_said", set())
    called: list[str] = []
    find = kernels.find

    def counted(kernel: Kernel, tensor: Tensor) -> kernels.Found:
        found = find(kernel, tensor)
        function = found.function
        if function is None:
            return found

        def remember(*args: Any, **options: Any) -> Any:
            called.append(kernel.function)
            return function(*args, **options)

        return found._replace(function=remember)

    monkeypatch.setattr(kernels, "find", counted)
    return called


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], None]:
    """Report the CPU's tensors as another device's; their dtype and limits stay their own."""

    def be(call: Call) -> None:
        monkeypatch.setattr(
            dispatch,
            "call_on",
            lambda tensor, limit: replace(call, dtype=tensor.dtype, limit=limit),
        )

    return be


def run_all(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Tensor]:
    """Each of the three functions once, on 2 sequences, with resets unless `changes` says else."""
    seq_idx = changes.get("seq_idx", SEQ_IDX)
    x = normal(2, LENGTH, 16).to(dtype)
    dt, BC = normal(2, LENGTH, 16, seed=1).to(dtype), normal(2, LENGTH, 1, 4, seed=2).to(dtype)
    D, A = normal(16, seed=3), -normal(16, 4, seed=4).exp()
    heads = x.unflatten(-1, (4, 4))
    ssd = dispatch.ssd(
        *(heads, dt[..., :4], A[:4, 0], BC, BC),
        D=D[:4],
        dt_bias=D[:4],
        seq_idx=seq_idx,
        initial_state=changes.get("ssd_state"),
        chunk_size=changes.get("chunk_size", 16),
    )
    selective = dispatch.selective(
        *(x, dt, A, BC[:, :, 0], BC[:, :, 0]),
        D=D,
        dt_bias=D,
        seq_idx=seq_idx,
        initial_state=changes.get("selective_state"),
    )
    weight = normal(16, 1, changes.get("width", 4), seed=5).to(dtype)
    convolution = dispatch.convolve(
        x, weight, None, seq_idx=seq_idx, initial_state=changes.get("convolution_state")
    )
    return {
        "ssd": ssd.y,
        "ssd_state": ssd.final_state,
        "selective": selective.y,
        "selective_state": selective.final_state,
        "convolution": convolution,
    }


EACH = ["mamba_chunk_scan_combined", "selective_scan_fn", "causal_conv1d_fn"]


def test_on_a_gpu_all_three_go_to_the_kernels(calls: list[str], pretend: Any) -> None:
    on_cpu = run_all()
    assert calls == []
    pretend(H100)
    on_gpu = run_all()
    assert calls == EACH
    for name, value in on_cpu.items():
        assert torch.allclose(value, on_gpu[name], atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_the_same_on_both_paths(
    dtype: torch.dtype, calls: list[str], pretend: Any
) -> None:
    on_cpu = run_all(dtype)
    pretend(H100)
    on_gpu = run_all(dtype)
    assert calls == EACH
    for name, value in on_cpu.items():
        expected = torch.float32 if name.endswith("_state") else dtype
        assert value.dtype == on_gpu[name].dtype == expected, name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"chunk_size": 24}, EACH[1:]),
        ({"width": 5}, EACH[:2]),
        ({"ssd_state": torch.ones(2, 4, 4, 4)}, EACH[1:]),
        ({"selective_state": torch.ones(2, 16, 4)}, [EACH[0], EACH[2]]),
        ({"convolution_state": torch.ones(2, 3, 16)}, EACH[:2]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_kernel_lacks_runs_in_pytorch(
    changes: dict[str, Any], expected: list[str], calls: list[str], pretend: Any
) -> None:
    on_cpu = run_all(**changes)
    pretend(H100)
    on_gpu = run_all(**changes)
    assert calls == expected
    for name, value in on_cpu.items():
        assert torch.allclose(value, on_gpu[name], atol=1e-5), name


def test_float64_runs_in_pytorch_and_stays_float64(calls: list[str], pretend: Any) -> None:
    pretend(H100)
    outputs = run_all(torch.float64)
    assert calls == []
    assert {value.dtype for value in outputs.values()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_trains_where_neither_bfloat16_nor_triton_is(
    dtype: torch.dtype, calls: list[str], pretend: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A P100 whose libraries import well: no Triton below 7.0, no code for it in the others."""

    def no_image(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(stand_ins, "require", no_image)  # the first thing that each launch does
    pretend(P100)
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    layer = nn.Linear(12, 16 + 4 + 4 + 4)
    weight = nn.Parameter(normal(24, 1, 4) / 2)
    A, D = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([*layer.parameters(), weight, A, D], lr=0.02)
    hidden, losses = normal(2, LENGTH, 12), []
    for _ in range(8):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            xBC, dt = layer(hidden).split((24, 4), dim=-1)
            xBC = dispatch.convolve(xBC, weight, None, seq_idx=SEQ_IDX)
            x, B, C = xBC.split((16, 4, 4), dim=-1)
            scan = dispatch.ssd(
                *(x.unflatten(-1, (4, 4)), dt, -A.exp(), B.unsqueeze(2), C.unsqueeze(2)),
                D=D,
                dt_bias=D,
                seq_idx=SEQ_IDX,
                chunk_size=16,
            )
            rows = dispatch.selective(
                *(x, x, -A.exp().repeat(4)[:, None].expand(16, 4), B, C),
                D=D.repeat(4),
                dt_bias=D.repeat(4),
                seq_idx=SEQ_IDX,
            )
        assert {xBC.dtype, scan.y.dtype, rows.y.dtype} == {dtype}
        loss = (scan.y.flatten(-2).float() - 1).square().mean() + rows.y.float().square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert calls == [] and losses[-1] < 0.9 * losses[0]
    said = {record.message for record in caplog.records}
    kind = str(dtype).removeprefix("torch.")
    broken = "cannot be used: RuntimeError: CUDA error: no kernel image is available for execution"
    assert said == {
        "mamba2 on cuda:0: the PyTorch scan "
        f"(compute capability 6.0, the kernel needs 7.0 for {kind})",
        f"mamba on cuda:0: the PyTorch scan (mamba-ssm {broken} on the device)",
        f"convolution on cuda:0: the PyTorch convolution (causal-conv1d {broken} on the device)",
    }


def test_says_once_what_runs(calls: list[str], pretend: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    decoding: dict[str, Any] = {
        "ssd_state": torch.ones(2, 4, 4, 4),
        "selective_state": torch.ones(2, 16, 4),
        "convolution_state": torch.ones(2, 3, 16),
    }
    for changes in ({}, decoding, {}):
        run_all(**changes)
    assert [record.message for record in caplog.records] == [
        "mamba2 on cpu: the PyTorch scan (tensors are on cpu)",
        "mamba on cpu: the PyTorch scan (tensors are on cpu)",
    ]
    caplog.clear()
    pretend(H100)
    unpacked: dict[str, Any] = {"seq_idx": None}
    for changes in (decoding, {}, unpacked, decoding):
        run_all(**changes)
    assert [record.message for record in caplog.records] == [
        "mamba2 on cuda:0: mamba-ssm 2.3.2's kernel",
        "mamba on cuda:0: mamba-ssm 2.3.2's kernel",
        "convolution on cuda:0: causal-conv1d 1.7.0's kernel",
    ]
    caplog.clear()
    pretend(CPU)
    run_all()
    assert caplog.records == []
