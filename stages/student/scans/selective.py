"""Mamba-1's selective scan in PyTorch, in linear memory, with a backward by hand.

Per channel d and state n, one position does

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = (sum over n of h_t C_t) + D x_t

Source: Gu and Dao 2023, "Mamba", arXiv:2312.00752, sections 3.2 and 3.3.2.

The states of all positions would be N times as large as the inputs, so they exist for one chunk of
positions and one block of sequences and channels at a time (`selective_blocks`). The forward keeps
the state that enters each chunk; the backward computes the states of a chunk again from there.

Precision: a decay below the square of the machine epsilon (1e-14 in float32) counts as 0, or
products of decays would become subnormal (below 1e-38), and a CPU needs up to 100 times as long for
those. `exp` is taken as a power of 2, which on a CPU takes half as long and minds no -inf.

The scan is one opaque operator to `torch.compile` and `torch.export`: traced, its loop would be
unrolled.

Letters in shape comments: B batch, S sequence, D channels, N state, K chunks per sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.student.scans.recorded import Scanned
from teacher_cache.stages.student.scans.selective_blocks import (
    CHUNK,
    Arguments,
    BackwardBlock,
    Block,
    chunks,
    parts,
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Scanned:
    """Scan a batch of sequences with Mamba-1's recurrence.

    Computes in float32 whatever the inputs' dtype and autocast say (float64 stays float64).

    Args:
        x: [B, S, D] inputs.
        dt: [B, S, D] step sizes, not negative (after softplus).
        A: [D, N] decay rates, not positive.
        B: [B, S, N] input maps.
        C: [B, S, N] output maps.
        D: [D] weight of the direct path from input to output, or none.
        seq_idx: [B, S] integers; the state is reset wherever the value changes along S.
        initial_state: [B, D, N] state before the first position, a constant; zeros if none.

    Returns:
        `y` [B, S, D] and `final_state` [B, D, N], float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes disagree.
    """
    _check_shapes(x, dt, A, B, C, D, seq_idx, initial_state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    resets = None
    if seq_idx is not None:  # the first position continues from the initial state
        resets = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    if initial_state is not None:
        initial_state = initial_state.detach().to(dtype)
    differentiable = any(tensor.requires_grad for tensor in (x, dt, A, B, C))
    keep = torch.is_grad_enabled() and differentiable
    y, carried = _scan(x, dt, A, B, C, resets, initial_state, keep)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype))
    # A copy, or whoever holds the state would hold all that the backward needs. It stays in the
    # layout in which the next call, if it continues from here, wants it.
    return Scanned(y, carried[-1].detach().clone().mT)


@torch.library.custom_op("teacher_cache::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    resets: Tensor | None,
    initial_state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The scan without `D`; resets [B, S] bool.

    Returns:
        y [B, S, D] and, if `keep`, the states that enter the chunks and the final one
        [K + 1, B, N, D], else the final one alone [1, B, N, D].
    """
    arguments = Arguments(x, dt, A, B, C, resets)
    y, carried = _empty_results(x, A, keep)
    with torch.autocast(x.device.type, enabled=False):
        for part in parts(x, A.shape[1]):
            rows, columns = part
            block = Block(arguments, part)
            state = x.new_zeros(()) if initial_state is None else initial_state[rows, columns].mT
            for chunk, span in enumerate(chunks(x.shape[1])):
                if keep:
                    carried[chunk, rows, :, columns] = state
                _, states = block.run(span, state)
                y[rows, span, columns] = block.outputs(span, states)
                state = states[-1]
            carried[-1, rows, :, columns] = state
    return y, carried


@_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    resets: Tensor | None,
    initial_state: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_results(x, A, keep)


def _empty_results(x: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    num_kept = (length + CHUNK - 1) // CHUNK if keep else 0
    carried = x.new_empty(num_kept + 1, batch, A.shape[1], channels)
    return x.new_empty(x.shape), carried


@torch.library.custom_op("teacher_cache::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    resets: Tensor | None,
    carried: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B and C from that of y [B, S, D]."""
    arguments = Arguments(x, dt, A, B, C, resets)
    grad_x, grad_dt = x.new_empty(x.shape), x.new_empty(x.shape)
    grad_A, grad_B, grad_C = (x.new_zeros(tensor.shape) for tensor in (A, B, C))
    with torch.autocast(x.device.type, enabled=False):
        for part in parts(x, A.shape[1]):
            rows, columns = part
            block = BackwardBlock(arguments, part, grad)
            for chunk, span in reversed(list(enumerate(chunks(x.shape[1])))):
                added = block.run_back(span, carried[chunk, rows, :, columns])
                grad_x[rows, span, columns] = added.x
                grad_dt[rows, span, columns] = added.dt
                grad_B[rows, span] += added.B
                grad_C[rows, span] += added.C
            grad_A[columns] += block.grad_A.mT
    return grad_x, grad_dt, grad_A, grad_B, grad_C


@_scan_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    resets: Tensor | None,
    carried: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, A, B, C = (tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C))
    return x, dt, A, B, C


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dt, A, B, C, resets, _, _ = inputs
    _, carried = output
    ctx.mark_non_differentiable(carried)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, A, B, C, resets, carried)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return (*_scan_backward(grad, *ctx.saved_tensors), None, None, None)


_scan.register_autograd(_backward, setup_context=_save)


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if x.ndim != 3 or A.ndim != 2 or x.numel() == 0:
        raise ValueError(f"x {list(x.shape)} and A {list(A.shape)} must be [B, S, D] and [D, N]")
    batch, length, channels = x.shape
    num_states = A.shape[1]
    expected = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, num_states)),
        "B": (B, (batch, length, num_states)),
        "C": (C, (batch, length, num_states)),
        "D": (D, (channels,)),
        "seq_idx": (seq_idx, (batch, length)),
        "initial_state": (initial_state, (batch, channels, num_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)} beside x")
