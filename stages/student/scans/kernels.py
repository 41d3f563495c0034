"""The CUDA libraries' kernels: which ones the student can use, and whether one works on a device.

`mamba_ssm` and `causal_conv1d` are imported when the first tensor on CUDA asks for them, never
before: a machine without CUDA does not pay for them, and a broken build of theirs does not stop
it. Whether a kernel works is then tried out, once a device: a build for other GPUs imports well and
fails at its first launch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacher_cache.cache.errors import first_line
from teacher_cache.stages.student.scans import adapters

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A library's function, and what it asks of a device.

    Attributes:
        library: the distribution that brings it.
        module: where it is.
        function: its name there.
        capability: the least compute capability of a GPU that can run it.
        bfloat16_capability: the least one that can run it on bfloat16.
        probe: launches something small of the library's on a tensor's device; gets the function
            and the tensor, raises if that fails.
    """

    library: str
    module: str
    function: str
    capability: tuple[int, int] = (0, 0)
    bfloat16_capability: tuple[int, int] = (0, 0)
    probe: Callable[[Callable[..., Any], Tensor], None]


class Found(NamedTuple):
    """What a search for a kernel came to.

    Attributes:
        function: the library's function, or none where it cannot be used.
        note: "mamba-ssm 2.3.2", or why it cannot be used.
    """

    function: Callable[..., Any] | None
    note: str


_found: dict[tuple[Kernel, torch.device], Found] = {}


def find(kernel: Kernel, tensor: Tensor) -> Found:
    """The kernel's function, if it works on the tensor's device; looked for once a device."""
    key = (kernel, tensor.device)
    if key not in _found:
        _found[key] = _try_out(kernel, tensor)
    return _found[key]


def _try_out(kernel: Kernel, tensor: Tensor) -> Found:
    package = kernel.module.split(".")[0]
    try:
        function = getattr(importlib.import_module(kernel.module), kernel.function)
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            kernel.probe(function, tensor)
        return Found(function, f"{kernel.library} {sys.modules[package].__version__}")
    # A library of another ABI, another CUDA or another GPU fails in any way there is, and the
    # PyTorch path can do the same work.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return Found(None, f"{kernel.library} is not installed")
        logger.debug("%s on %s", kernel.module, tensor.device, exc_info=True)
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Found(None, f"{kernel.library} cannot be used: {reason}")


def _probe_triton(_: Callable[..., Any], tensor: Tensor) -> None:
    # The scan itself picks its block sizes by timing its first call, so that must be a real one.
    # The norm that the library brings needs the same compiler and compiles one small kernel.
    norms = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    x = tensor.new_ones(2, 16, dtype=torch.float32)
    _check_finite(norms.rmsnorm_fn(x, x[0].clone(), None))


def _probe_selective(function: Callable[..., Any], tensor: Tensor) -> None:
    x = tensor.new_ones(1, 8, 8, dtype=torch.float32)
    A = -x[0]
    scanned = adapters.selective(function, x, x, A, x, x, D=A[0], dt_bias=A[0], seq_idx=None)
    _check_finite(scanned.y)


def _probe_convolution(function: Callable[..., Any], tensor: Tensor) -> None:
    x = tensor.new_ones(1, 8, 8, dtype=torch.float32)
    weight = tensor.new_ones(8, 1, 4, dtype=torch.float32)
    _check_finite(adapters.convolve(function, x, weight, None, seq_idx=None))


def _check_finite(y: Tensor) -> None:
    if not y.isfinite().all():  # waits for the device, and so for errors of the launch
        raise ArithmeticError("a first try on small numbers gave values that are not finite")


SSD = Kernel(
    library="mamba-ssm",
    module="mamba_ssm.ops.triton.ssd_combined",
    function="mamba_chunk_scan_combined",
    capability=(7, 0),  # Triton's
    bfloat16_capability=(8, 0),  # Triton's products of bfloat16 matrices
    probe=_probe_triton,
)
SELECTIVE = Kernel(
    library="mamba-ssm",
    module="mamba_ssm.ops.selective_scan_interface",
    function="selective_scan_fn",
    probe=_probe_selective,
)
CONVOLUTION = Kernel(
    library="causal-conv1d",
    module="causal_conv1d",
    function="causal_conv1d_fn",
    probe=_probe_convolution,
)
