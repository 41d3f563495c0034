"""The selective scan of some sequences and channels, a chunk of positions at a time.

A chunk's tensors are laid out [L, R, N, W]: then each position is contiguous, and the innermost
loop runs over channels, whatever the number of states. The positions follow each other, each one
operation on all of its position; everything else is one operation on a whole chunk, in place or
into a buffer that every chunk uses.

Letters in shape comments: B batch, S sequence, D channels, N state; of one block L positions of a
chunk, R sequences, W channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
