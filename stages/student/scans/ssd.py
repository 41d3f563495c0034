"""Mamba-2's scan (state space duality, SSD) as chunked matrix products in PyTorch.

Per head, with state h [P, N], one position does

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Within a chunk of L positions that is a product with the lower-triangular matrix
`M_ij = (C_i . B_j) exp(sum of dt A over (j, i])`; between chunks one state per chunk is carried.
Time and memory are linear in the length. Source: Dao and Gu 2024, "Transformers are SSMs",
section 6, arXiv:2405.21060.

Precision: sums of `dt A` are taken and subtracted in float64 before they are rounded, so that a
large sum early in a chunk costs nothing later. Exponents are masked before `exp`: none is ever
positive. A decay below the square of the machine epsilon (1e-14 in float32) counts as 0, or
products of decays and gradients would become subnormal (below 1e-38), and a CPU needs 100 times
as long for those.

The two steps that have a backward of their own are operators that `torch.compile` and
`torch.export` take as they are: autograd's own backward would keep and pass over twice as many
[L, L] matrices, and a traced loop over chunks would hold for one length only.

Letters in shape comments: B batch, S sequence, H heads, P head width, G groups of heads that share
B and C, N state, L chunk length, K chunks per sequence, Q chunks of the whole batch (B times K).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from teacher_cache.stages.student.scans.recorded import Scanned, plain_operators


def wide(device: torch.device) -> torch.dtype:
    """What sums of exponents are taken in; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def exp_(exponent: Tensor) -> Tensor:
    """The exp, overwriting its input; exactly 0 where it would be below the epsilon's square."""
    lowest = 2 * math.log(torch.finfo(exponent.dtype).eps)
    in_place = not exponent.requires_grad  # autograd keeps exp's result
    decay = exponent.clamp_(lowest, 0.0).exp_()
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
    return exp_(exponent).mul_(_seen(segment, length, sums.device))


def _seen(segment: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Whether position i sees position j: [L, L], or [Q, 1, L, L] where there are resets."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if segment is None:
        return seen
    return seen & (segment[:, :, None] == segment[:, None, :])[:, None]


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


def _within_chunks(
    x: Tensor,
    dt: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    segment: Tensor | None,
) -> tuple[Tensor]:
    """The output of `ssd_within_chunks` in plain operators."""
    sums = log_decay.transpose(1, 2)  # [Q, H, L]
    decay = exp_((sums[..., :, None] - sums[..., None, :]).to(x.dtype))
    decay = decay * _seen(segment, x.shape[1], x.device)
    scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # [Q, G, L, L]
    y = _times_scores(decay, scores) @ (x * dt[..., None]).transpose(1, 2)
    return (y.transpose(1, 2) + x * D[:, None],)


def _carry_step_by_step(states: Tensor, through: Tensor, initial_state: Tensor | None) -> Tensor:
    """`ssd_carry` in plain operators: a loop over chunks that is one operator (ONNX's Scan)."""

    def step(entering: Tensor, one: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        left, decay = one  # [B, H, P, N], [B, H]
        return left + entering * decay[..., None, None], entering.clone()

    if initial_state is None:
        initial_state = torch.zeros_like(states[:, 0])
    # The exporter cannot follow gradients through its loop.
    steps = tuple(one.detach().transpose(0, 1).clone() for one in (states, through))
    _, entering = scan(step, initial_state.detach(), steps)
    return entering.transpose(0, 1).contiguous()


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> Scanned:
    """Scan a batch of sequences with Mamba-2's recurrence.

    Computes in float32 whatever the inputs' dtype and autocast say (float64 stays float64).

    Args:
        x: [B, S, H, P] inputs.
        dt: [B, S, H] step sizes, not negative (after softplus).
        A: [H] decay rates, not positive.
        B: [B, S, G, N] input maps; G divides H.
        C: [B, S, G, N] output maps.
        D: [H] weight of the direct path from input to output, or none.
        seq_idx: [B, S] integers; the state is reset wherever the value changes along S.
        initial_state: [B, H, P, N] state before the first position, a constant; zeros if none.
        chunk_size: most positions per chunk; a shorter sequence is one chunk.

    Returns:
        `y` [B, S, H, P] and `final_state` [B, H, P, N], float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes disagree or `chunk_size` is not positive.
    """
    _check_shapes(x, dt, A, B, C, D, seq_idx, initial_state, chunk_size)
    batch, length = x.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    D = torch.zeros_like(A) if D is None else D.to(dtype)
    initial_state = None if initial_state is None else initial_state.detach().to(dtype)

    tracing = torch.compiler.is_compiling()
    num_chunks, chunk_length = _chunks(length, chunk_size, any_length=tracing)
    padding = num_chunks * chunk_length - length
    pad = partial(_padded, length=num_chunks * chunk_length, tracing=tracing)
    segment = None
    if seq_idx is not None:  # counts the resets, so that a value that returns is a new segment
        resets = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        segment = pad(resets).cumsum(dim=1).view(-1, chunk_length)  # [Q, L]
    if tracing or padding:  # dt = 0: padding neither decays nor writes the state
        x, dt, B, C = (pad(tensor) for tensor in (x, dt, B, C))
    x, dt, B, C = (t.reshape(-1, chunk_length, *t.shape[2:]) for t in (x, dt, B, C))  # [Q, L, ...]

    with torch.autocast(device_type=x.device.type, enabled=False):
        # [Q, L, H] from the chunk's start. A step below -100 decays to 0 whatever its size, and a
        # huge one would swallow the later steps of the sum.
        dtype_of_sums = wide(x.device)
        log_decay = (dt.to(dtype_of_sums) * A.to(dtype_of_sums)).clamp(min=-100.0).cumsum(dim=1)
        within, carry = ssd_within_chunks, ssd_carry
        if plain_operators():
            within, carry = _within_chunks, _carry_step_by_step
        y, *_ = within(x, dt, log_decay, B, C, D, segment)
        # One chunk that starts from nothing passes nothing on but its final state, a constant.
        alone = not tracing and num_chunks == 1 and initial_state is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
            to_end, through, from_start = _edge_decays(log_decay, segment, num_chunks, dtype)
            states = _left_behind(x, dt, B, to_end, num_chunks)
            entering = carry(states, through, initial_state)
        if not alone:
            y = _add_entering(y, entering, C, from_start)
        final_state = entering[:, -1] * through[:, -1, :, None, None] + states[:, -1]
    y = y.reshape(batch, num_chunks * chunk_length, *x.shape[2:])
    if tracing:  # as `_padded`
        y = y.index_select(1, torch.arange(length, device=y.device))
    elif padding:
        y = y[:, :length]
    return Scanned(y, final_state.detach())


def _padded(tensor: Tensor, length: int, *, tracing: bool) -> Tensor:
    """[B, S, ...] with zeros behind it, [B, length, ...]; a trace does not ask which is longer."""
    batch, size, *others = tensor.shape
    if not tracing:
        return F.pad(tensor, (0, 0) * len(others) + (0, length - size))
    whole = tensor.new_zeros(batch, length, *others)
    return whole.index_copy(1, torch.arange(size, device=tensor.device), tensor)


def _chunks(length: int, chunk_size: int, *, any_length: bool) -> tuple[int, int]:
    """Number of chunks and positions in each; equal chunks need less padding than full ones.

    A traced graph serves any length, so none is special there: it always has two chunks or more
    and some padding.
    """
    if any_length:
        return length // chunk_size + 2, chunk_size
    num_chunks = math.ceil(length / chunk_size)
    return num_chunks, math.ceil(length / num_chunks)


def _left_behind(x: Tensor, dt: Tensor, B: Tensor, to_end: Tensor, num_chunks: int) -> Tensor:
    """What each chunk's own positions add to the state at its end: [B, K, H, P, N]."""
    num, length, heads, width = x.shape
    groups, num_states = B.shape[2:]
    # The heads of a group share one product.
    steps = (x * (dt * to_end)[..., None]).view(num, length, groups, heads // groups * width)
    states = steps.permute(0, 2, 3, 1) @ B.transpose(1, 2)  # [Q, G, H/G P, N]
    return states.view(-1, num_chunks, heads, width, num_states)


def _add_entering(y: Tensor, entering: Tensor, C: Tensor, from_start: Tensor) -> Tensor:
    """Add to y [Q, L, H, P] what reaches each chunk from before it."""
    groups, num_states = C.shape[2:]
    entering = entering.view(C.shape[0], groups, -1, num_states)  # [Q, G, H/G P, N]
    arriving = (C.transpose(1, 2) @ entering.transpose(2, 3)).transpose(1, 2)  # [Q, L, G, H/G P]
    return torch.addcmul(y, arriving.reshape(y.shape), from_start[..., None])


def _edge_decays(
    log_decay: Tensor, segment: Tensor | None, num_chunks: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay from each position to its chunk's end, through the chunk, and from its start.

    Args:
        log_decay: [Q, L, H] float64, sums from each chunk's start.
        segment: [Q, L] number of resets so far, or none.
        num_chunks: K.
        dtype: of the result.

    Returns:
        [Q, L, H], [B, K, H] and [Q, L, H]; 0 across a reset.
    """
    last = log_decay[:, -1:]
    to_end = exp_((last - log_decay).to(dtype))
    from_start = exp_(log_decay.to(dtype, copy=True))
    if segment is not None:
        end = segment[:, -1:].view(-1, num_chunks)
        before = F.pad(end[:, :-1], (1, 0))  # the segment that the chunk before ended in
        to_end = to_end * (segment == end.view(-1, 1))[..., None]
        from_start = from_start * (segment == before.view(-1, 1))[..., None]
    return to_end, from_start[:, -1].unflatten(0, (-1, num_chunks)), from_start


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    if x.ndim != 4 or B.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"x {list(x.shape)} and B {list(B.shape)} must be [B, S, H, P], [B, S, G, N]"
        )
    batch, length, heads, _ = x.shape
    groups, num_states = B.shape[2:]
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, num_states)),
        "C": (C, (batch, length, groups, num_states)),
        "D": (D, (heads,)),
        "seq_idx": (seq_idx, (batch, length)),
        "initial_state": (initial_state, (batch, heads, x.shape[3], num_states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)} beside x")
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups")
