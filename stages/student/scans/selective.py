"""Mamba-1's selective scan in PyTorch, in linear memory, with a backward by hand.

Per channel d and state n, one position does

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = (sum over n of h_t C_t) + D x_t

Source: Gu and Dao 2023, "Mamba", arXiv:2312.00752, sections 3.2 and 3.3.2.

The states of all positions would be N times as large as the inputs, so they exist for one chunk of
positions and one block of sequences and channels at a time (`Block`). The forward keeps
the state that enters each chunk; the backward computes the states of a chunk again from there.

Precision: a decay below the square of the machine epsilon (1e-14 in float32) counts as 0, or
products of decays would become subnormal (below 1e-38), and a CPU needs up to 100 times as long for
those. `exp` is taken as a power of 2, which on a CPU takes half as long and minds no -inf.

The scan is one opaque operator to `torch.compile` and `torch.export`: traced, its loop would be
unrolled.

A chunk's tensors are laid out [L, R, N, W]: then each position is contiguous, and the innermost
loop runs over channels, whatever the number of states. The positions follow each other, each one
operation on all of its position; everything else is one operation on a whole chunk, in place or
into a buffer that every chunk uses.

Letters in shape comments: B batch, S sequence, D channels, N state, K chunks per sequence; of one
block L positions of a chunk, R sequences, W channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from teacher_cache.stages.student.scans.recorded import Scanned, plain_operators

CHUNK = 16  # positions; 1/16 of the states is kept for the backward
# Numbers in one position of a block: enough to make a call's overhead small, few enough for a
# chunk's buffers to stay in a CPU's cache. A GPU wants few, large calls.
CPU_STEP, GPU_STEP = 40_000, 4_000_000


class Arguments(NamedTuple):
    """A scan's inputs, in one dtype.

    Attributes:
        x: [B, S, D].
        dt: [B, S, D].
        A: [D, N].
        B: [B, S, N].
        C: [B, S, N].
        resets: [B, S] bool, where the state is set to 0 first; none if nowhere.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    resets: Tensor | None


class Part(NamedTuple):
    """Which sequences and channels a block has."""

    rows: slice
    columns: slice


def parts(x: Tensor, num_states: int) -> Iterator[Part]:
    """Blocks of a suitable size: several sequences, or one, or some channels of one."""
    batch, _, channels = x.shape
    size = CPU_STEP if x.device.type == "cpu" else GPU_STEP
    width = math.ceil(channels / math.ceil(channels * num_states / size))
    height = max(1, size // (channels * num_states))
    for row in range(0, batch, height):
        for column in range(0, channels, width):
            yield Part(slice(row, row + height), slice(column, column + width))


def chunks(length: int) -> list[slice]:
    """The positions of each chunk of a sequence."""
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


class Block:
    """One part of a scan, forward.

    Args:
        arguments: of the whole scan.
        part: which of it.
    """

    def __init__(self, arguments: Arguments, part: Part) -> None:
        x, dt, A, B, C, resets = arguments
        rows, columns = part
        # Transposed, so that a span of positions comes first.
        self._x, self._dt = (t[rows, :, columns].transpose(0, 1) for t in (x, dt))  # [S, R, W]
        self._B, self._C = (t[rows].transpose(0, 1) for t in (B, C))  # [S, R, N]
        self._resets = None if resets is None else resets[rows].T  # [S, R]
        self._A = A[columns].mT.contiguous()  # [N, W]
        self._exponents = self._A * math.log2(math.e)
        shape = (self._x.shape[1], *self._A.shape)
        self._decays = x.new_empty(CHUNK, *shape)
        self._states = x.new_empty(1 + CHUNK, *shape)  # the first is the state that enters
        self._by_position = list(zip(self._states[1:].unbind(), self._decays.unbind(), strict=True))
        self._lowest = 2 * math.log2(torch.finfo(x.dtype).eps)

    def run(self, span: slice, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Run through a chunk.

        Args:
            span: its positions.
            entering: [R, N, W] state, or 0.

        Returns:
            Its decays and its states, [L, R, N, W] in buffers that the next chunk overwrites.
        """
        # First of all, as it may lie in the buffer, where the chunk before left it.
        before = self._states[0].copy_(_without_tiny(entering))
        steps = self._dt[span, :, None]  # [L, R, 1, W]
        decays, states = self._decays[: len(steps)], self._states[1 : 1 + len(steps)]
        torch.mul(steps, self._exponents, out=decays)
        F.threshold(decays, self._lowest, -torch.inf, inplace=True).exp2_()
        if self._resets is not None:
            places = self._resets[span].flatten().nonzero()[:, 0]
            decays.flatten(0, 1).index_fill_(0, places, 0)
        written = self._x[span, :, None] * steps  # [L, R, 1, W]
        torch.mul(written, self._B[span, ..., None], out=states)
        for state, decay in self._by_position[: len(steps)]:
            before = state.addcmul_(before, decay)
        return decays, states

    def outputs(self, span: slice, states: Tensor) -> Tensor:
        """What a chunk's states [L, R, N, W] put out: [R, L, W]."""
        return (self._C[span, :, None] @ states)[:, :, 0].transpose(0, 1)


class Gradients(NamedTuple):
    """What a chunk adds to the gradients: x and dt [R, L, W], B and C [R, L, N]."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


class BackwardBlock(Block):
    """One part of a scan, backward: chunks are run through again, the last one first.

    Args:
        arguments: of the whole scan.
        part: which of it.
        grad: [B, S, D], of the outputs.

    Attributes:
        grad_A: [N, W], of the chunks so far.
    """

    def __init__(self, arguments: Arguments, part: Part, grad: Tensor) -> None:
        super().__init__(arguments, part)
        self._grad = grad[part.rows, :, part.columns].transpose(0, 1)  # [S, R, W]
        self._flow, self._spare = torch.empty_like(self._decays), torch.empty_like(self._decays)
        self._arriving = grad.new_zeros(())  # at a chunk's last state, from the chunk after it
        self.grad_A = torch.zeros_like(self._A)

    def run_back(self, span: slice, entering: Tensor) -> Gradients:
        """Run through a chunk and back; arguments as in `run`."""
        decays, states = self.run(span, entering)
        x, steps, grad = (t[span, :, None] for t in (self._x, self._dt, self._grad))  # [L, R, 1, W]
        spare = self._spare[: len(states)]
        grad_C = torch.mul(states, grad, out=spare).sum(-1)

        flow = self._state_gradients(span, decays)  # [L, R, N, W]
        grad_B = torch.mul(flow, x * steps, out=spare).sum(-1)
        grad_written = self._B[span, :, None] @ flow  # [L, R, 1, W], of x dt

        flow.mul_(decays)
        self._arriving = _without_tiny(flow[0])
        flow.mul_(self._states[: len(states)])  # now the gradients of dt A
        self.grad_A += torch.mul(flow, steps, out=spare).sum((0, 1))
        grad_steps = flow.mul_(self._A).sum(2, keepdim=True)  # [L, R, 1, W]
        grad_steps.addcmul_(grad_written, x)
        columns = (grad_written.mul_(steps)[:, :, 0], grad_steps[:, :, 0])
        return Gradients(*(t.transpose(0, 1) for t in (*columns, grad_B, grad_C)))

    def _state_gradients(self, span: slice, decays: Tensor) -> Tensor:
        """The gradients of a chunk's states, in a buffer, like them [L, R, N, W]."""
        flow = self._flow[: len(decays)]
        torch.mul(self._grad[span, :, None], self._C[span, ..., None], out=flow)
        flow[-1] += self._arriving
        later = flow[-1]
        by_position = list(zip(flow[:-1].unbind(), decays[1:].unbind(), strict=True))
        for here, decay in reversed(by_position):
            later = here.addcmul_(later, decay)
        return flow


def _without_tiny(state: Tensor) -> Tensor:
    """A state or its gradient, exactly 0 where decays could soon make it subnormal."""
    limits = torch.finfo(state.dtype)
    return F.hardshrink(state, limits.tiny / limits.eps**2)


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
    if plain_operators():
        y, final_state = _step_by_step(x, dt, A, B, C, resets, initial_state)
        return Scanned(y if D is None else y + x * D.to(dtype), final_state)
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


def _step_by_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    resets: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan without `D` in plain operators: y [B, S, D] and the final state [B, D, N].

    A loop over positions that is one operator (ONNX's Scan); its memory is that of one position.
    """
    A = A.detach()  # the exporter cannot follow gradients through its loop
    kept = torch.ones_like(x) if resets is None else (~resets)[..., None].expand_as(x).to(x.dtype)

    def step(state: Tensor, one: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x, dt, B, C, kept = one  # [B, D] or [B, N]
        state = state * torch.exp(dt[..., None] * A) * kept[..., None]
        state = state + (x * dt)[..., None] * B[:, None]
        return state, (state * C[:, None]).sum(-1)

    if initial_state is None:
        initial_state = torch.zeros_like(x[:, 0, :, None] * A)
    steps = tuple(one.detach().transpose(0, 1).clone() for one in (x, dt, B, C, kept))
    final_state, y = scan(step, initial_state.detach(), steps)
    return y.transpose(0, 1), final_state


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
