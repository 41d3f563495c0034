"""Who computes a recurrence: a CUDA kernel where there is one for the call, else PyTorch.

The choice is made for every call, by its tensors: a model may train on a GPU and be evaluated on
the CPU in one process. Calls that continue from an initial state (decoding, a few positions each)
always run in PyTorch. The first call of each kind says in the log what runs it, and why; there is
another line only when the answer changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.student.scans import kernels
from teacher_cache.stages.student.scans.kernels import Kernel
from teacher_cache.stages.student.scans.recorded import Scanned, step_sizes
from teacher_cache.stages.student.scans.selective import selective_scan
from teacher_cache.stages.student.scans.ssd import ssd_scan

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_said: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Call:
    """What of a call decides who computes it.

    Attributes:
        is_cuda: whether its tensors are on CUDA.
        device: where they are: "cpu", "cuda:0".
        capability: the GPU's compute capability; (0, 0) elsewhere.
        dtype: of its sequences.
        limit: what keeps these shapes from the kernel, or none.
    """

    is_cuda: bool
    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    limit: str | None


def call_on(tensor: Tensor, limit: str | None) -> Call:
    """The call that runs where `tensor` is, in its dtype."""
    return Call(
        is_cuda=tensor.is_cuda,
        device=str(tensor.device),
        capability=torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0),
        dtype=tensor.dtype,
        limit=limit,
    )


def objection(kernel: Kernel, call: Call) -> str | None:
    """Why the call cannot go to the kernel; none if nothing but the library's state may forbid it.

    Pure: looks at no device and imports nothing.
    """
    if not call.is_cuda:
        return f"tensors are on {call.device}"
    least = kernel.capability
    if call.dtype == torch.bfloat16:
        least = max(least, kernel.bfloat16_capability)
    if call.capability < least:
        found, needed = (".".join(map(str, pair)) for pair in (call.capability, least))
        kind = str(call.dtype).removeprefix("torch.")
        return f"compute capability {found}, the kernel needs {needed} for {kind}"
    if call.dtype not in KERNEL_DTYPES:
        return f"no kernel for {str(call.dtype).removeprefix('torch.')}"
    return call.limit


def missing_kernels(arch: str, device: torch.device) -> list[str]:
    """What of a student's two kernels cannot be used on a GPU, and why: of each a note."""
    scan = kernels.SSD if arch == "mamba2" else kernels.SELECTIVE
    found = [
        kernels.find(one, torch.empty(0, device=device)) for one in (scan, kernels.CONVOLUTION)
    ]
    return [one.note for one in found if one.function is None]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int,
) -> Scanned:
    """Mamba-2's scan: mamba-ssm's Triton kernels, or `ssd_scan`.

    Args:
        x: [B, S, H, P] inputs.
        dt: [B, S, H] step sizes before bias and softplus.
        A: [H] decay rates, not positive.
        B: [B, S, G, N] input maps; G divides H.
        C: [B, S, G, N] output maps.
        D: [H] weight of the direct path from input to output.
        dt_bias: [H], added to `dt` before the softplus.
        seq_idx: [B, S] integers; the state is reset wherever the value changes along S.
        initial_state: [B, H, P, N] state before the first position, a constant; zeros if none.
        chunk_size: most positions per chunk.

    Returns:
        `y` [B, S, H, P] in x's dtype and `final_state` [B, H, P, N] in float32 at least.
    """
    kernel = None
    if initial_state is None:
        kernel = _choose("mamba2", kernels.SSD, x, kernels.ssd_limit(x, chunk_size))
    if kernel is not None:
        return kernels.ssd(
            kernel, x, dt, A, B, C, D=D, dt_bias=dt_bias, seq_idx=seq_idx, chunk_size=chunk_size
        )
    scanned = ssd_scan(
        x,
        step_sizes(dt, dt_bias),
        A,
        B,
        C,
        D=D,
        seq_idx=seq_idx,
        initial_state=initial_state,
        chunk_size=chunk_size,
    )
    return scanned._replace(y=scanned.y.to(x.dtype))


def selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Scanned:
    """Mamba-1's scan: mamba-ssm's CUDA kernel, or `selective_scan`.

    Args:
        x: [B, S, D] inputs.
        dt: [B, S, D] step sizes before bias and softplus.
        A: [D, N] decay rates, not positive.
        B: [B, S, N] input maps.
        C: [B, S, N] output maps.
        D: [D] weight of the direct path from input to output.
        dt_bias: [D], added to `dt` before the softplus.
        seq_idx: [B, S] integers; the state is reset wherever the value changes along S.
        initial_state: [B, D, N] state before the first position, a constant; zeros if none.

    Returns:
        `y` [B, S, D] in x's dtype and `final_state` [B, D, N] in float32 at least.
    """
    kernel = None
    if initial_state is None:
        kernel = _choose("mamba", kernels.SELECTIVE, x, kernels.selective_limit(A))
    if kernel is not None:
        return kernels.selective(kernel, x, dt, A, B, C, D=D, dt_bias=dt_bias, seq_idx=seq_idx)
    dt = step_sizes(dt, dt_bias)
    scanned = selective_scan(x, dt, A, B, C, D=D, seq_idx=seq_idx, initial_state=initial_state)
    return scanned._replace(y=scanned.y.to(x.dtype))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    activates: bool = True,
) -> Tensor:
    """SiLU of the causal convolution per channel: causal-conv1d's kernel, or `causal_conv`.

    Args:
        x: [B, S, D]; may be a slice of a wider tensor.
        weight: [D, 1, W]; the last tap weighs the position itself.
        bias: [D] or none.
        seq_idx: [B, S] integers; taps do not reach across a change of value.
        initial_state: [B, W - 1, D] inputs before the first position; zeros if none.
        activates: False for the convolution without its SiLU.

    Returns:
        [B, S, D] in x's dtype.
    """
    kernel = None
    if initial_state is None:
        kernel = _choose("convolution", kernels.CONVOLUTION, x, kernels.convolution_limit(weight))
    if kernel is not None:
        return kernels.convolve(kernel, x, weight, bias, seq_idx=seq_idx, activates=activates)
    y = causal_conv(x, weight, bias, seq_idx=seq_idx, initial_state=initial_state)
    return (F.silu(y) if activates else y).to(x.dtype)


def _choose(
    kind: str, kernel: Kernel, tensor: Tensor, limit: str | None
) -> Callable[..., Any] | None:
    """The library's function if the call can go there, else none; says so once."""
    call = call_on(tensor, limit)
    function, note = None, objection(kernel, call)
    if note is None:
        function, note = kernels.find(kernel, tensor)
    if torch.compiler.is_compiling():
        return function  # a traced graph says nothing
    if call.is_cuda or kind != "convolution":  # on a CPU the scan's line says it all
        ours = "convolution" if kind == "convolution" else "scan"
        path = f"the PyTorch {ours} ({note})" if function is None else f"{note}'s kernel"
        line = f"{kind} on {call.device}: {path}"
        if line not in _said:
            _said.add(line)
            logger.info(line)
    return function


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Convolve each channel with the positions up to and including its own.

    Args:
        x: [B, S, D].
        weight: [D, 1, W]; the last tap weighs the position itself.
        bias: [D] or none.
        seq_idx: [B, S] integers, or none; taps do not reach across a change of value.
        initial_state: [B, W - 1, D] inputs before the first position; zeros if none.

    Returns:
        [B, S, D].
    """
    reach = weight.shape[-1] - 1
    if initial_state is not None:
        x = torch.cat([initial_state.to(x.dtype), x], dim=1)
        if seq_idx is not None:  # what came before belongs to the first position's sample
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, reach), seq_idx], dim=1)
        return causal_conv(x, weight, bias, seq_idx=seq_idx)[:, reach:]
    if seq_idx is None:
        # [B, D, 1, S] with channels last in memory: as 1d it is several times slower on a CPU.
        padded = F.pad(x, (0, 0, reach, 0)).transpose(1, 2).unsqueeze(2)
        return F.conv2d(padded, weight.unsqueeze(2), bias, groups=len(weight)).squeeze(2).mT
    segment = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)  # [B, S]
    taps = weight[:, 0].unbind(-1)
    y = x * taps[-1] if bias is None else x * taps[-1] + bias
    for distance, tap in enumerate(reversed(taps[:-1]), start=1):
        reached = F.pad(segment, (distance, 0), value=-1)[:, :-distance] == segment
        y = y + F.pad(x, (0, 0, distance, 0))[:, :-distance] * reached[..., None] * tap
    return y
