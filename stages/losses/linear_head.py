"""What is computed of a linear head over a large vocabulary, without the logits of all positions.

The objective, a cross-entropy and the log-probs of given tokens: a chunk of positions at a time
gets its logits, its share of the result and its gradients, and its logits are dropped. Every term
is a sum over positions by counts of the step, so the chunks' shares add up like those of
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.divergences import chosen_measure, head_divergence
from teacher_cache.stages.losses.draws import SampledTargets, WeightedTargets, kl_of_drawn
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    Targets,
    TargetsByPosition,
    check_objective,
    distillation_objective,
    objective_of_distances,
)

MAX_LOGITS = 2**24
"""Logits that exist at a time: 64 MB in float32, and as much again for a temporary copy."""
MANY_OUTCOMES = 2**13
"""From so many on, passes over all of them cost more than what is done for a few one by one."""


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
            part = _Part(
                targets.at_positions(chunk),
                None if labels is None else labels[chunk],
                None if top1_log_prob is None else top1_log_prob[chunk],
                has_teacher is None or bool(has_teacher[chunk].all()),
            )
            if (
                len(weight) >= MANY_OUTCOMES
                and not learned
                and not soft_cap
                and part.is_sparse(config)
            ):
                share, gradient = _in_one_pass(
                    gradients.logits(chunk, over=config.temperature).detach(),
                    part,
                    config=config,
                    totals=totals,
                    support=support,
                )
                if gradients.are_needed:
                    gradients.add(chunk, gradient)
                shares.append({one.name: getattr(share, one.name) for one in fields(share)})
                continue
            logits = gradients.logits(chunk)  # [n, V]
            share = distillation_objective(
                logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap),
                part.targets,
                part.labels,
                config=config,
                totals=totals,
                top1_log_prob=part.top1_log_prob,
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


@dataclass(frozen=True)
class _Part:
    """What is known of a chunk of positions beside their states."""

    targets: Targets
    labels: Tensor | None
    top1_log_prob: Tensor | None
    all_have_teachers: bool

    def is_sparse(self, config: ObjectiveConfig) -> bool:
        """Whether all that is lost depends on a few outcomes and on sums over the others."""
        has_head = isinstance(self.targets, SampledTargets | WeightedTargets) or (
            isinstance(self.targets, TeacherDistribution) and self.targets.head_ids is not None
        )
        return has_head and self.all_have_teachers and not config.label_smoothing


def _in_one_pass(
    scaled: Tensor,
    part: _Part,
    *,
    config: ObjectiveConfig,
    totals: StepTotals,
    support: Tensor | None,
) -> tuple[ObjectiveTerms, Tensor]:
    """A chunk's share of the objective, and the gradient by its logits.

    Every term depends on the logits of a few outcomes and on the sums of `exp(s / T)` and `exp(s)`
    over all others. So its gradient there is one number a position times the student's
    probabilities, for both temperatures of one exponential, and what is of the head is corrected:
    docs/maths.md, section 4.

    Args:
        scaled: [n, V] logits over the temperature; overwritten by the gradient.
        part: of the same positions.
        config: the weights of the terms.
        totals: of the whole optimizer step.
        support: [V] bool, or None.
    """
    check_objective(scaled, part.targets, part.labels, config, part.top1_log_prob, None)
    few = _Few.taken_from(scaled, part, support)
    largest = scaled.amax(dim=1, keepdim=True)
    base = largest.masked_fill(largest == -torch.inf, 0.0)
    others = scaled.sub_(base).exp_()  # [n, V], exp((s - base) / T), 0 at the few
    others_at_1 = _power(others, config.temperature)
    rest = others.sum(dim=1, keepdim=True).log() + base  # [n, 1]
    rest_at_1 = others_at_1.sum(dim=1, keepdim=True).log() + config.temperature * base
    with torch.enable_grad():
        log_z = torch.logaddexp(few.head.logsumexp(dim=1, keepdim=True), rest)
        log_q = (torch.cat([few.head, rest], dim=1) - log_z).requires_grad_()  # [n, K+1]
        at_1 = torch.cat([few.head, few.unsupported], dim=1) * config.temperature
        log_z_at_1 = torch.logaddexp(at_1.logsumexp(dim=1, keepdim=True), rest_at_1)
        costs = None
        if few.label is not None:
            found = log_z_at_1[:, 0] - config.temperature * few.label
            costs = torch.where(few.is_label, found, 0.0).requires_grad_()
        share = objective_of_distances(
            few.distances(log_q, config),
            costs,
            few.agrees(largest),
            part.targets,
            config=config,
            totals=totals,
            top1_log_prob=part.top1_log_prob,
        )
        leaves = [log_q, *([] if costs is None else [costs])]
        of_log_q, *of_costs = torch.autograd.grad(
            share.loss, leaves, allow_unused=True, materialize_grads=True
        )
    inner = of_log_q - of_log_q.sum(dim=1, keepdim=True) * log_q.detach().exp()  # by s / T
    inner = inner.masked_fill(log_q.detach() == -torch.inf, 0.0) / config.temperature
    by_cost = of_costs[0][:, None] * few.is_label[:, None] if of_costs else None
    per_sum = (base - rest).exp().nan_to_num(nan=0.0, posinf=0.0)
    if by_cost is None:
        gradient = others.mul_(inner[:, -1:] * per_sum)
    else:
        at_1_by_sum = by_cost * (config.temperature * base - log_z_at_1).exp()
        gradient = others.mul_(inner[:, -1:] * per_sum).addcmul_(others_at_1, at_1_by_sum)
    few.correct(gradient, inner[:, :-1], by_cost, log_z_at_1, config.temperature)
    return replace(share, loss=share.loss.detach()), gradient


def _power(values: Tensor, exponent: float) -> Tensor:
    """A new tensor, unless it is the first."""
    if exponent == 1:
        return values.clone()
    return values * values if exponent == 2 else values.pow(exponent)


@dataclass(frozen=True, kw_only=True)
class _Few:
    """The outcomes whose logits are looked at one by one; [n, V] holds -inf in their places.

    Attributes:
        targets: of the positions.
        ids: [n, K] int64 of the head, any id in an empty slot.
        head: [n, K] logits over T, -inf in empty slots and outside the support.
        outside_ids: [U] of what is no outcome for the teacher.
        unsupported: [n, U] their logits over T.
        label: [n] of the labels, over T; None of an unlabelled batch.
        label_ids: [n], 0 where there is none to learn.
        is_label: [n] bool, whether there is one.
        top_ids: [n], the teacher's most probable; None where draws may have missed it.
        top: [n] their logits over T.
    """

    targets: Targets
    ids: Tensor
    head: Tensor
    outside_ids: Tensor
    unsupported: Tensor
    label: Tensor | None
    label_ids: Tensor
    is_label: Tensor
    top_ids: Tensor | None
    top: Tensor | None

    @classmethod
    def taken_from(cls, scaled: Tensor, part: _Part, support: Tensor | None) -> _Few:
        """Take them out of logits over T, which get -inf instead."""
        targets, labels = part.targets, part.labels
        if isinstance(targets, TeacherDistribution):
            ids = targets.head_ids
        else:
            assert isinstance(targets, SampledTargets | WeightedTargets), "it is sparse"
            ids = targets.ids
        assert ids is not None, "it is sparse"
        filled = ids >= 0
        slots = ids.clamp(min=0)
        if support is not None:
            filled = filled & support[slots]
        outside = scaled.new_zeros(0, dtype=torch.long)
        if support is not None:
            outside = (~support).nonzero()[:, 0]
        is_label = torch.ones(len(scaled), dtype=torch.bool, device=scaled.device)
        label_ids = slots.new_zeros(len(scaled))
        if labels is not None:
            is_label = labels != NO_LABEL
            label_ids = labels.where(is_label, 0)
        top_ids = targets.top_ids()

        def at(ids: Tensor) -> Tensor:
            return scaled.gather(1, ids[:, None])[:, 0]

        found = cls(
            targets=targets,
            ids=slots,
            head=scaled.gather(1, slots).masked_fill(~filled, -torch.inf),
            outside_ids=outside,
            unsupported=scaled[:, outside],
            label=None if labels is None else at(label_ids),
            label_ids=label_ids,
            is_label=is_label,
            top_ids=top_ids,
            top=None
            if top_ids is None
            else at(top_ids.clamp(min=0)).where(top_ids >= 0, -torch.inf),
        )
        rows, columns = filled.nonzero(as_tuple=True)  # an empty slot takes nothing out
        scaled[rows, slots[rows, columns]] = -torch.inf
        scaled[:, outside] = -torch.inf
        return found

    def distances(self, log_q: Tensor, config: ObjectiveConfig) -> Tensor:
        """[n], by log-probs of head and ghost."""
        targets = self.targets
        if isinstance(targets, SampledTargets | WeightedTargets):
            if config.divergence == "kl":
                return kl_of_drawn(log_q, targets)
            targets = targets.coarse()
        assert isinstance(targets, TeacherDistribution), "it has a head"
        return head_divergence(log_q, targets, chosen_measure(config))

    def agrees(self, largest: Tensor) -> Tensor | None:
        """[n] bool, whether the teacher's most probable id is the student's too.

        Args:
            largest: [n, 1] logits over T of all other outcomes.
        """
        if self.top_ids is None or self.top is None:
            return None
        top_ids = self.top_ids[:, None]
        others = [
            largest,
            self.head.masked_fill(self.ids == top_ids, -torch.inf),
            self.unsupported.masked_fill(self.outside_ids == top_ids, -torch.inf),
        ]
        return self.top > torch.cat(others, dim=1).amax(dim=1)

    def correct(
        self,
        gradient: Tensor,
        of_head: Tensor,
        by_cost: Tensor | None,
        log_z_at_1: Tensor,
        temperature: float,
    ) -> None:
        """Add what these outcomes' own gradients are to [n, V], which has 0 in their places."""
        found = of_head
        if by_cost is not None:
            q = (temperature * self.head - log_z_at_1).exp()
            found = found + by_cost * q
            outside = (temperature * self.unsupported - log_z_at_1).exp()
            gradient[:, self.outside_ids] += by_cost * outside
        gradient.scatter_add_(1, self.ids, found.to(gradient.dtype))
        if by_cost is not None:
            gradient.scatter_add_(1, self.label_ids[:, None], -by_cost.to(gradient.dtype))


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

    def logits(self, chunk: slice, *, over: float = 1.0) -> Tensor:
        """[n, V] of a chunk over a number, a leaf where anything before needs a gradient."""
        hidden, _, bias = self._inputs
        states = hidden[chunk].detach().to(self._head.dtype)
        logits = (states if over == 1 else states / over) @ self._head.T
        if bias is not None:
            logits += bias.detach() if over == 1 else bias.detach() / over
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
