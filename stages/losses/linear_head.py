"""What is computed of a linear head over a large vocabulary, without the logits of all positions.

The objective, a cross-entropy and the log-probs of given tokens: a chunk of positions at a time
gets its logits, its share of the result and its gradients, and its logits are dropped. Every term
is a sum over positions by counts of the step, so the chunks' shares add up like those of
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    TargetsByPosition,
    distillation_objective,
)

MAX_LOGITS = 2**24
"""Logits that exist at a time: 64 MB in float32, and as much again for a temporary copy."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T` to the targets.

    Logits and sums are float32 or wider, under autocast too. Beside the inputs, memory holds one
    chunk of logits with a temporary copy, and a gradient of the size of each input. The gradient
    cannot be differentiated again.

    Args:
        hidden: [N, D].
        weight: [V, D], a head without bias.
        targets: [N] int64 in 0..V-1.
        max_logits: logits that exist at a time; at least one position's are.

    Returns:
        Scalar in nats, float32 or wider; 0 for N = 0.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_head(hidden, weight, ids=targets)
    gradients = _Gradients(hidden, weight, None, ())
    loss = hidden.new_zeros((), dtype=_wide(hidden, weight))
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(len(hidden), len(weight), max_logits):
            logits, wanted = gradients.logits(chunk).detach(), targets[chunk, None]  # [n, V]
            log_z = logits.logsumexp(dim=1, keepdim=True)  # [n, 1]
            loss += (log_z - logits.gather(1, wanted)).sum()
            if gradients.are_needed:
                # The gradient is the softmax, less 1 at the target; in the place of the logits.
                gradient = logits.sub_(log_z).exp_()
                gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))
                gradients.add(chunk, gradient)
    return gradients.attached_to(loss)


def linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: TargetsByPosition,
    labels: Tensor | None,
    *,
    config: ObjectiveConfig,
    totals: StepTotals,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    top1_log_prob: Tensor | None = None,
    has_teacher: Tensor | None = None,
    support: Tensor | None = None,
    learned: Sequence[Tensor] = (),
    max_logits: int = MAX_LOGITS,
) -> ObjectiveTerms:
    """`distillation_objective` of `cap(hidden @ weight.T + bias)`, with the head's arguments.

    Logits and gradients are float32 or wider, under autocast too. The gradient cannot be
    differentiated again.

    Args:
        hidden: [N, D] the student's states at the counted positions.
        weight: [V, D] its head.
        targets: the teacher's; asked for a chunk of positions at a time.
        labels: [N], or None for an unlabelled batch.
        config: the weights of the terms.
        totals: of the whole optimizer step.
        bias: [V] of the head, or None.
        soft_cap: `c` of `c tanh(logits / c)`, nats; None for logits as they are.
        top1_log_prob: [N], given where `conf_power` is above 0.
        has_teacher: [N] bool, or None.
        support: [V] bool, or None.
        learned: of any shape, what makes the targets and is learned itself: they get a gradient,
            of zeros where no target depends on them.
        max_logits: logits that exist at a time, beside a few temporary copies of them; at least
            one position's do.

    Raises:
        ValueError: if hidden and weight do not fit, or as `distillation_objective`.
        UserError: as `distillation_objective`.
    """
    _check_head(hidden, weight, bias=bias)
    num_taught = len(hidden) if has_teacher is None else int(has_teacher.sum())
    totals.check_covers(num_taught, labeled=labels is not None)
    gradients = _Gradients(hidden, weight, bias, learned)
    shares = []
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(max(1, len(hidden)), len(weight), max_logits):
            logits = gradients.logits(chunk)  # [n, V]
            share = distillation_objective(
                logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap),
                targets.at_positions(chunk),
                None if labels is None else labels[chunk],
                config=config,
                totals=totals,
                top1_log_prob=None if top1_log_prob is None else top1_log_prob[chunk],
                has_teacher=None if has_teacher is None else has_teacher[chunk],
                support=support,
            )
            gradients.add_of(chunk, logits, share.loss)
            shares.append({one.name: getattr(share, one.name) for one in fields(share)})
            shares[-1]["loss"] = share.loss.detach()
    sums: dict[str, Any] = {
        name: None if first is None else sum((one[name] for one in shares[1:]), start=first)
        for name, first in shares[0].items()
    }
    sums["loss"] = gradients.attached_to(sums["loss"])
    return ObjectiveTerms(**sums)


def _check_head(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, ids: Tensor | None = None
) -> None:
    if hidden.ndim != 2 or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [N, D] and "
            "[V, D]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias {tuple(bias.shape)} for {len(weight)} outcomes")
    if ids is not None and ids.shape != hidden.shape[:1]:
        raise ValueError(f"ids {tuple(ids.shape)} for {len(hidden)} positions")


def _chunks(num: int, vocab_size: int, max_logits: int) -> list[slice]:
    """Of the positions, each of at most so many logits; one position at least."""
    size = max(1, max_logits // vocab_size)
    return [slice(start, start + size) for start in range(0, num, size)]


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


class _Gradients:
    """Those of a linear head's inputs, collected chunk by chunk; none where none are needed.

    Args:
        hidden: [N, D].
        weight: [V, D].
        bias: [V], or None.
        learned: what else the loss depends on.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, learned: Sequence[Tensor]
    ):
        dtype = _wide(hidden, weight)
        self._inputs, self._learned = (hidden, weight, bias), learned
        self._head = weight.detach().to(dtype)
        has_gradient = torch.is_grad_enabled()

        def needs(one: Tensor | None) -> bool:
            return has_gradient and one is not None and one.requires_grad

        self._hidden = torch.zeros_like(hidden, dtype=dtype) if needs(hidden) else None
        self._weight = torch.zeros_like(self._head) if needs(weight) else None
        self._bias = torch.zeros_like(self._head[:, 0]) if needs(bias) else None
        self._of_learned = [torch.zeros_like(one) for one in learned] if has_gradient else []

    def logits(self, chunk: slice) -> Tensor:
        """[n, V] of a chunk, a leaf where anything before them needs a gradient."""
        hidden, _, bias = self._inputs
        logits = hidden[chunk].detach().to(self._head.dtype) @ self._head.T
        if bias is not None:
            logits += bias.detach()
        return logits.requires_grad_(self.are_needed)

    @property
    def are_needed(self) -> bool:
        """Whether anything before the logits needs a gradient."""
        return any(one is not None for one in (self._hidden, self._weight, self._bias))

    def add_of(self, chunk: slice, logits: Tensor, loss: Tensor) -> None:
        """What a chunk's loss adds."""
        if not logits.requires_grad:
            return
        gradient, *others = torch.autograd.grad(loss, [logits, *self._learned], allow_unused=True)
        assert gradient is not None, "the loss is of the logits"
        for found, other in zip(self._of_learned, others, strict=True):
            if other is not None:
                found += other
        self.add(chunk, gradient)

    def add(self, chunk: slice, gradient: Tensor) -> None:
        """What the gradient [n, V] of a chunk's logits adds."""
        if self._hidden is not None:
            self._hidden[chunk] = gradient @ self._head
        if self._weight is not None:
            states = self._inputs[0][chunk].detach().to(self._head.dtype)
            self._weight.addmm_(gradient.T, states)
        if self._bias is not None:
            self._bias += gradient.sum(dim=0)

    def attached_to(self, loss: Tensor) -> Tensor:
        """The loss with these gradients."""
        inputs = [*self._inputs, *(self._learned if self._of_learned else ())]
        gradients = [self._hidden, self._weight, self._bias, *self._of_learned]
        return _WithGradients.apply(loss, len(inputs), *inputs, *gradients)  # pyright: ignore[reportReturnType]  (a Tensor)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, num: int, *tensors: Tensor | None) -> Tensor:
        """Keep the gradients for `backward`.

        Args:
            ctx: torch's.
            loss: scalar.
            num: of the inputs.
            *tensors: the inputs, and behind them the gradient of each, or None.
        """
        ctx.save_for_backward(*tensors[num:])
        ctx.dtypes = [None if one is None else one.dtype for one in tensors[:num]]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale them by the gradient of the loss; rounded to the inputs' dtype only then."""
        scaled = [
            None if gradient is None else (grad_output * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, *scaled, *([None] * len(scaled)))


def linear_next_log_probs(
    hidden: Tensor, weight: Tensor, next_ids: Tensor, *, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Log-probs of the next tokens under `softmax(hidden @ weight.T)`.

    float32 or wider, under autocast too. The gradient cannot be differentiated again.

    Args:
        hidden: [N, D].
        weight: [V, D], a head without bias.
        next_ids: [N] int64 in 0..V-1.
        max_logits: logits that exist at a time; at least one position's are.

    Returns:
        [N] nats.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_head(hidden, weight, ids=next_ids)
    with torch.autocast(hidden.device.type, enabled=False):
        return _NextLogProbs.apply(hidden, weight, next_ids, max_logits)  # pyright: ignore[reportReturnType]  (a Tensor)


class _NextLogProbs(torch.autograd.Function):
    """A chunk of positions at a time, forwards and backwards."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, next_ids: Tensor, max_logits: int
    ) -> Tensor:
        """Keep the inputs alone."""
        ctx.save_for_backward(hidden, weight, next_ids)
        ctx.max_logits = max_logits
        head = weight.to(_wide(hidden, weight))
        found = [
            _log_probs(hidden[at], head).gather(1, next_ids[at, None])[:, 0]
            for at in _chunks(len(hidden), len(weight), max_logits)
        ]
        return torch.cat(found) if found else head.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """`grad (onehot - softmax)`, by head and states."""
        hidden, weight, next_ids = ctx.saved_tensors
        head = weight.to(_wide(hidden, weight))
        of_hidden = torch.zeros_like(hidden, dtype=head.dtype)
        of_weight = torch.zeros_like(head)
        for at in _chunks(len(hidden), len(weight), ctx.max_logits):
            gradient = _log_probs(hidden[at], head).exp_().neg_()
            gradient[torch.arange(len(gradient), device=gradient.device), next_ids[at]] += 1
            gradient *= grad_output[at, None]
            of_hidden[at] = gradient @ head
            of_weight.addmm_(gradient.T, hidden[at].to(head.dtype))
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None, None


def _log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    return torch.log_softmax(hidden.to(head.dtype) @ head.T, dim=-1)
