"""The two steps of Mamba-2's chunked scan that have a backward of their own.

Each is an operator that `torch.compile` and `torch.export` take as it is: autograd's own backward
would keep and pass over twice as many [L, L] matrices, and a traced loop over chunks would hold
for one length only. Letters in shape comments are `ssd`'s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(device: torch.device) -> torch.dtype:
    """What sums of exponents are taken in; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def exp_(exponent: Tensor) -> Tensor:
    """The exp, overwriting its input; exactly 0 where it would be below the epsilon's square."""
    lowest = 2 * math.log(torch.finfo(exponent.dtype).eps)
    in_place = not exponent.requires_grad  # autograd keeps exp's result
    decay = exponent.clamp_(lowest, 0).exp_()
    return F.threshold(decay, 1.001 * math.exp(lowest), 0.0, inplace=in_place)


@torch.library.custom_op("teacher_cache::ssd_within_chunks", mutates_args=())
def ssd_within_chunks(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a chunk's positions pass to each other, and the direct path `D x`.

    Args:
        x: [Q, L, H, P].
        dt: [Q, L, H].
        log_decay: [Q, L, H] float64, sums of `dt A` from each chunk's start.
        B: [Q, L, G, N].
        C: [Q, L, G, N].
        D: [H].
        segment: [Q, L] number of resets so far, or none.

    Returns:
        The output [Q, L, H, P], and for the backward `x dt` [Q, H, L, P], the decays
        [Q, H, L, L] and `C B^T` [Q, G, L, L].
    """
    steps = _by_head(x, dt)  # [Q, H, L, P]
    decay = _decay_matrix(log_decay, segment, x.dtype)  # [Q, H, L, L]
    scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # [Q, G, L, L]
    y = _times_scores(decay, scores) @ steps  # [Q, H, L, P]
    direct = torch.addcmul(y.transpose(1, 2), x, D[:, None], out=torch.empty_like(x))
    return direct, steps, decay, scores


@ssd_within_chunks.register_fake
def _(
    x: Tensor, dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, D: Tensor, segment: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num, length, heads, width = x.shape
    return (
        torch.empty_like(x),
        x.new_empty(num, heads, length, width),
        x.new_empty(num, heads, length, length),
        x.new_empty(num, B.shape[2], length, length),
    )


@torch.library.custom_op("teacher_cache::ssd_within_chunks_backward", mutates_args=())
def _within_chunks_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    steps: Tensor,
    decay: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_y = grad.transpose(1, 2).contiguous()  # [Q, H, L, P]
    grad_steps = _times_scores(decay, scores).transpose(2, 3) @ grad_y
    flow = grad_y @ steps.transpose(2, 3)  # [Q, H, L, L], gradient of decay * scores
    flow *= decay
    grad_scores = flow.unflatten(1, (scores.shape[1], -1)).sum(2)  # [Q, G, L, L]
    flow = _times_scores(flow, scores)  # gradient of the exponents
    # An exponent on the diagonal is constantly 0; its terms would cancel below, but not
    # exactly, and where all decays are strong they are all there is.
    flow.diagonal(dim1=2, dim2=3).zero_()
    dtype = wide(flow.device)
    grad_log_decay = flow.sum(3, dtype=dtype) - flow.sum(2, dtype=dtype)

    grad_steps = grad_steps.transpose(1, 2)  # [Q, L, H, P]
    products = grad * x
    grad_D = products.sum((0, 1, 3))
    grad_dt = torch.mul(grad_steps, x, out=products).sum(3)
    grad_x = torch.mul(grad_steps, dt[..., None], out=products).addcmul_(grad, D[:, None])
    grad_B = (grad_scores.transpose(2, 3) @ C.transpose(1, 2)).transpose(1, 2)
    grad_C = (grad_scores @ B.transpose(1, 2)).transpose(1, 2)
    gradients = (grad_x, grad_dt, grad_log_decay.transpose(1, 2), grad_B, grad_C)
    return *(one.contiguous() for one in gradients), grad_D  # pyright: ignore[reportReturnType]


@_within_chunks_backward.register_fake
def _(
    grad: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, D: Tensor, *kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_decay = dt.new_empty(dt.shape, dtype=wide(x.device))
    gradients = (x, dt, log_decay, B, C, D)
    return tuple(one.new_empty(one.shape) for one in gradients)  # pyright: ignore[reportReturnType]


def _keep_within_chunks(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, _, B, C, D, _ = inputs
    ctx.save_for_backward(x, dt, B, C, D, *output[1:])
    ctx.set_materialize_grads(False)  # nothing but y is differentiated


def _differentiate_within_chunks(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *_within_chunks_backward(grad, *ctx.saved_tensors), None


ssd_within_chunks.register_autograd(_differentiate_within_chunks, setup_context=_keep_within_chunks)


def _by_head(x: Tensor, dt: Tensor) -> Tensor:
    """`x dt` laid out [Q, H, L, P] for a product per head, in one pass over x [Q, L, H, P]."""
    num, length, heads, width = x.shape
    out = x.new_empty(num, heads, length, width)
    return torch.mul(x.transpose(1, 2), dt.transpose(1, 2)[..., None], out=out)


def _times_scores(matrix: Tensor, scores: Tensor) -> Tensor:
    """A matrix per head [Q, H, L, L] times its group's scores [Q, G, L, L]."""
    return (matrix.unflatten(1, (scores.shape[1], -1)) * scores[:, :, None]).flatten(1, 2)


def _decay_matrix(log_decay: Tensor, segment: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The exp of the sum of `dt A` over (j, i] for i >= j in one segment, else 0: [Q, H, L, L]."""
    num, length, heads = log_decay.shape
    sums = log_decay.transpose(1, 2)
    exponent = torch.empty(num, heads, length, length, dtype=dtype, device=sums.device)
    torch.sub(sums[..., :, None], sums[..., None, :], out=exponent)
    seen = torch.ones(length, length, dtype=torch.bool, device=sums.device).tril()
    if segment is not None:
        seen = seen & (segment[:, :, None] == segment[:, None, :])[:, None]  # [Q, 1, L, L]
    return exp_(exponent).mul_(seen)


@torch.library.custom_op("teacher_cache::ssd_carry", mutates_args=())
def ssd_carry(states: Tensor, through: Tensor, initial_state: Tensor | None) -> Tensor:
    """From what each chunk leaves behind to the state that each chunk starts with.

    Args:
        states: [B, K, H, P, N].
        through: [B, K, H] decay through each chunk.
        initial_state: [B, H, P, N] that the first chunk starts with, a constant; zeros if none.

    Returns:
        [B, K, H, P, N].
    """
    entering = torch.empty_like(states)
    entering[:, 0] = 0 if initial_state is None else initial_state
    for chunk in range(1, states.shape[1]):
        before = chunk - 1
        decay = through[:, before, :, None, None]
        torch.addcmul(states[:, before], entering[:, before], decay, out=entering[:, chunk])
    return entering


@ssd_carry.register_fake
def _(states: Tensor, through: Tensor, initial_state: Any) -> Tensor:
    return torch.empty_like(states)


@torch.library.custom_op("teacher_cache::ssd_carry_backward", mutates_args=())
def _carry_backward(grad: Tensor, entering: Tensor, through: Tensor) -> tuple[Tensor, Tensor]:
    """Sets gradients to 0 that the decays of further chunks would make subnormal."""
    smallest = torch.finfo(grad.dtype).tiny / torch.finfo(grad.dtype).eps ** 2
    grad_states = torch.empty_like(entering)
    grad_states[:, -1] = 0
    for chunk in range(entering.shape[1] - 2, -1, -1):
        after = chunk + 1
        decay = through[:, after, :, None, None]
        total = torch.addcmul(grad[:, after], grad_states[:, after], decay)
        grad_states[:, chunk] = F.hardshrink(total, smallest)
    return grad_states, (grad_states * entering).sum((3, 4))


@_carry_backward.register_fake
def _(grad: Tensor, entering: Tensor, through: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(entering), through.new_empty(through.shape)


def _keep_carry(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _differentiate_carry(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_carry_backward(grad, *ctx.saved_tensors), None


ssd_carry.register_autograd(_differentiate_carry, setup_context=_keep_carry)
