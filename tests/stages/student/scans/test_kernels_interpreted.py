"""mamba-ssm's real Triton kernels for Mamba-2, interpreted on a CPU, against our scan in float64.

This confirms the calling convention, forward and backward, without a GPU; speed, compilation,
atomics and the GPU's roundings it cannot. With Triton, einops, NumPy below 2.4 (Triton 3.6's
interpreter needs it) and mamba-ssm's unpacked source in SITE:

    TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1 PYTHONPATH=SITE .venv/bin/python -m pytest -m slow \\
        tests/stages/student/scans/test_kernels_interpreted.py

`MAMBA_DETERMINISTIC` makes the library take the first block sizes that fit instead of timing all of
them on a GPU. The interpreter has no bfloat16.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from teacher_cache.stages.student.scans import dispatch, kernels
from tests.scan_calls import assert_close, scan_results, ssd_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(
            os.environ.get(name) == "1" for name in ("TRITON_INTERPRET", "MAMBA_DETERMINISTIC")
        ),
        reason="needs TRITON_INTERPRET=1 and MAMBA_DETERMINISTIC=1 in the environment",
    ),
    pytest.mark.skipif(
        not all(find_spec(name) for name in ("triton", "einops", "mamba_ssm")),
        reason="needs triton, einops and mamba_ssm, installed or on PYTHONPATH",
    ),
    pytest.mark.skipif(
        tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
        reason="Triton's interpreter turns arrays into numbers as NumPy 2.4 no longer does",
    ),
]

# Resets within a chunk, at its start (16), for one position, and a value that comes back.
SEQ_IDX = torch.tensor([[4] * 9 + [5] + [4] * 6 + [6] * 24, [1] * 16 + [2] * 16 + [1] * 8])


@pytest.fixture(scope="module")
def kernel() -> Iterator[Callable[..., Any]]:
    """`mamba_chunk_scan_combined`, where a CPU takes the GPU's place."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("selective_scan_cuda") is None:  # Mamba-1's binary, which the import asks for
            patch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        properties = SimpleNamespace(multi_processor_count=4)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        yield getattr(importlib.import_module(kernels.SSD.module), kernels.SSD.function)


@pytest.mark.parametrize(
    ("width", "groups", "packed", "dtype", "atomics"),
    [
        (48, 1, False, torch.float32, True),
        (48, 2, True, torch.float32, False),  # the library's deterministic mode
        (96, 1, True, torch.float32, True),
        (96, 1, True, torch.float16, True),
    ],
)
def test_equals_our_scan(
    kernel: Callable[..., Any],
    width: int,
    groups: int,
    packed: bool,
    dtype: torch.dtype,
    atomics: bool,
) -> None:
    # Sums of a hundred rounded terms at most; four times 2^-11, the rounding of float16.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    determinism = importlib.import_module("mamba_ssm.utils.determinism")
    determinism.set_deterministic_mode(not atomics)
    inputs = ssd_inputs(2, SEQ_IDX.shape[1], 2, width, groups, 48, dtype)
    options: dict[str, Any] = {"seq_idx": SEQ_IDX if packed else None, "chunk_size": 16}
    got = scan_results(partial(kernels.ssd, kernel), inputs, **options)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    assert_close(got, scan_results(dispatch.ssd, exact, **options), tolerance)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_lengths_that_are_no_multiple_of_a_chunk(kernel: Callable[..., Any], length: int) -> None:
    inputs = ssd_inputs(2, length, 2, 16, 1, 48)
    options: dict[str, Any] = {"seq_idx": SEQ_IDX[:, :length], "chunk_size": 16}
    got = scan_results(partial(kernels.ssd, kernel), inputs, **options)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    assert_close(got, scan_results(dispatch.ssd, exact, **options), 1e-5)


def test_probe_runs(kernel: Callable[..., Any]) -> None:
    kernels.SSD.try_out(kernel, torch.zeros(1))
