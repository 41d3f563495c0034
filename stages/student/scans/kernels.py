"""The CUDA libraries' kernels, under our signatures, and whether one works on a device.

`ssd`, `selective` and `convolve` bring layouts, dtypes and resets into the form that a library
wants, and take its own function as their first argument. What a library checks (and what it does
not check, but needs) was read in mamba-ssm 2.3.2 and causal-conv1d 1.7.0.

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
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.cache.errors import first_line
from teacher_cache.stages.student.scans.recorded import Scanned
from teacher_cache.stages.student.scans.unpacking import lay_end_to_end, plan_rows

# A step size before softplus for positions that must leave the state alone: softplus of it, with
# any bias that occurs, is exactly 0. float16 ends at 65,504.
NO_STEP = -1e4


def ssd_limit(x: Tensor, chunk_size: int) -> str | None:
    """What keeps a call from Mamba-2's kernel, or none; arguments as in `ssd`."""
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        return f"chunk_size {chunk_size} is no power of two from 16 up"
    if x.shape[0] * -(-x.shape[1] // chunk_size) > 65_535:  # the second dimension of a launch
        return "the batch has more than 65,535 chunks"
    return None


def ssd(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> Scanned:
    """Mamba-2's scan by `mamba_chunk_scan_combined`; arguments as in `dispatch.ssd`.

    The kernel multiplies matrices in x's dtype and keeps step sizes, decays and the final state in
    float32. It takes strided slices.
    """
    with torch.autocast(x.device.type, enabled=False):
        y, final_state = kernel(
            x,
            dt,
            A.float(),
            B.to(x.dtype),
            C.to(x.dtype),
            chunk_size,
            D=D.float(),
            dt_bias=dt_bias.float(),
            dt_softplus=True,
            seq_idx=None if seq_idx is None else _segments(seq_idx),
            return_final_states=True,
        )
    return Scanned(y, final_state.detach())


def selective_limit(A: Tensor) -> str | None:
    """What keeps a call from Mamba-1's kernel, or none; arguments as in `selective`."""
    if A.shape[1] > 256:
        return f"the state's size {A.shape[1]} is above 256"
    if A.shape[0] > 65_535:  # the second dimension of a launch
        return f"{A.shape[0]} channels are more than 65,535"
    return None


def selective(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None,
) -> Scanned:
    """Mamba-1's scan by `selective_scan_fn`; arguments as in `dispatch.selective`.

    The kernel knows no resets: packed samples are unpacked into rows of their own, a few groups
    of rows of similar lengths, and put back. Sequences come in x's dtype, parameters in float32.
    """
    parameters = (A.float(), D.float(), dt_bias.float())
    dt, B, C = dt.to(x.dtype), B.to(x.dtype), C.to(x.dtype)
    plan = None if seq_idx is None else plan_rows(seq_idx)
    with torch.autocast(x.device.type, enabled=False):
        if plan is None:
            return _selective_rows(kernel, x, dt, B, C, *parameters)
        scanned = []
        for group in plan.groups:
            x_rows, dt_rows, B_rows, C_rows = (group.rows_of(t) for t in (x, dt, B, C))
            dt_rows = dt_rows.masked_fill(group.padding[..., None], NO_STEP)
            scanned.append(_selective_rows(kernel, x_rows, dt_rows, B_rows, C_rows, *parameters))
        y = lay_end_to_end([rows.y for rows in scanned]).index_select(0, plan.places)
        final_states = torch.cat([rows.final_state for rows in scanned])
        return Scanned(y.view(x.shape), final_states[plan.last_rows])


def _selective_rows(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Scanned:
    """One launch on rows [R, L, ...] without resets."""
    y, final_state = kernel(
        *(x.mT.contiguous(), dt.mT.contiguous()),  # [R, D, L]
        *(A, B.mT.contiguous(), C.mT.contiguous(), D),  # B, C: [R, N, L]
        delta_bias=dt_bias,
        delta_softplus=True,
        return_last_state=True,
    )
    return Scanned(y.mT, final_state.detach())


def convolution_limit(weight: Tensor) -> str | None:
    """What keeps a call from the convolution's kernel, or none; arguments as in `convolve`."""
    channels, _, width = weight.shape
    if not 2 <= width <= 4:
        return f"width {width} is not 2, 3 or 4"
    if channels % 8:
        return f"{channels} channels are no multiple of 8"
    return None


def convolve(
    kernel: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seq_idx: Tensor | None,
    activates: bool = True,
) -> Tensor:
    """The convolution and its SiLU by `causal_conv1d_fn`; arguments as in `dispatch.convolve`."""
    with torch.autocast(x.device.type, enabled=False):
        y = kernel(
            _aligned(x).mT,  # [B, D, S], channels last in memory
            weight[:, 0],
            None if bias is None else bias.to(weight.dtype),
            seq_idx=None if seq_idx is None else _segments(seq_idx),
            activation="silu" if activates else None,
        )
    return _AlignedGradient.apply(y.mT)


def _aligned(x: Tensor) -> Tensor:
    """`x` [B, S, D], or a copy of it if the convolution cannot read its layout.

    The kernel loads 16 bytes at a time. It refuses strides that are no multiple of 8, and does not
    check where the first element lies, as a slice of the projection may lie anywhere.
    `contiguous()` would not do: it keeps the odd strides of dimensions of size 1.
    """
    batch_stride, position_stride, channel_stride = x.stride()
    strides_fit = channel_stride == 1 and position_stride >= 8 and position_stride % 8 == 0
    if strides_fit and batch_stride % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


class _AlignedGradient(torch.autograd.Function):
    """The same values; the gradient reaches the convolution in a layout that it can read."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _aligned(grads[0])


def _segments(seq_idx: Tensor) -> Tensor:
    """How often the value has changed up to each position: [B, S] int32, 0 at the start.

    We reset at changes, the kernels compare values: one that comes back would bring the state
    back. And they take a first value other than 0 for a reset, a negative one for padding.
    """
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1, dtype=torch.int32)


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
        try_out: launches something small of the library's on a tensor's device; gets the function
            and the tensor, raises if that fails.
    """

    library: str
    module: str
    function: str
    capability: tuple[int, int] = (0, 0)
    bfloat16_capability: tuple[int, int] = (0, 0)
    try_out: Callable[[Callable[..., Any], Tensor], None]


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
            kernel.try_out(function, tensor)
        return Found(function, f"{kernel.library} {sys.modules[package].__version__}")
    # A library of another ABI, another CUDA or another GPU fails in any way there is, and the
    # PyTorch path can do the same work.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return Found(None, f"{kernel.library} is not installed")
        logger.debug("%s on %s", kernel.module, tensor.device, exc_info=True)
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Found(None, f"{kernel.library} cannot be used: {reason}")


def _try_triton(_: Callable[..., Any], tensor: Tensor) -> None:
    # The scan itself picks its block sizes by timing its first call, so that must be a real one.
    # The norm that the library brings needs the same compiler and compiles one small kernel.
    norms = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    x = tensor.new_ones(2, 16, dtype=torch.float32)
    _check_finite(norms.rmsnorm_fn(x, x[0].clone(), None))


def _try_selective(function: Callable[..., Any], tensor: Tensor) -> None:
    x = tensor.new_ones(1, 8, 8, dtype=torch.float32)
    A = -x[0]
    scanned = selective(function, x, x, A, x, x, D=A[0], dt_bias=A[0], seq_idx=None)
    _check_finite(scanned.y)


def _try_convolution(function: Callable[..., Any], tensor: Tensor) -> None:
    x = tensor.new_ones(1, 8, 8, dtype=torch.float32)
    weight = tensor.new_ones(8, 1, 4, dtype=torch.float32)
    _check_finite(convolve(function, x, weight, None, seq_idx=None))


def _check_finite(y: Tensor) -> None:
    if not y.isfinite().all():  # waits for the device, and so for errors of the launch
        raise ArithmeticError("a first try on small numbers gave values that are not finite")


SSD = Kernel(
    library="mamba-ssm",
    module="mamba_ssm.ops.triton.ssd_combined",
    function="mamba_chunk_scan_combined",
    capability=(7, 0),  # Triton's
    bfloat16_capability=(8, 0),  # Triton's products of bfloat16 matrices
    try_out=_try_triton,
)
SELECTIVE = Kernel(
    library="mamba-ssm",
    module="mamba_ssm.ops.selective_scan_interface",
    function="selective_scan_fn",
    try_out=_try_selective,
)
CONVOLUTION = Kernel(
    library="causal-conv1d",
    module="causal_conv1d",
    function="causal_conv1d_fn",
    try_out=_try_convolution,
)
