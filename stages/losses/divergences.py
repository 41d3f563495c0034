"""Divergences from a cached teacher to the student, one position at a time, in log space.

Each is a function of two arrays of log-probs over the same outcomes: every class or token of a
dense teacher, the head's and the ghost token of a sparse one. All are f-divergences, so merging
the tail into one outcome bounds the full one from below, and equals it where the head is all.

An outcome whose probability is 0 (log-prob -inf, or so low that it underflows) adds nothing, to
the value or to the gradient; 0 * (-inf - x) would be NaN, and a NaN that is masked only afterwards
still reaches the gradient, so infinite terms are taken out before a product and again after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import (
    TeacherDistribution,
    dense_log_probs,
    head_log_probs,
)

Measure = Callable[[Tensor, Tensor], Tensor]
"""From log-probs of teacher and student, [..., M] each over the same outcomes, to [...]."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL, `sum p (log p - log q)`, nats; inf where the student excludes what p does not."""
    # Compared with 0, not found above it: a NaN must come out as NaN, not pass for excluded.
    possible = log_p.detach().exp() != 0
    log_p = torch.where(possible, log_p, 0.0)
    log_q = torch.where(possible, log_q, 0.0)
    terms = torch.where(possible, log_p.exp() * (log_p - log_q), 0.0)  # [..., M]
    return terms.sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Reverse KL, `sum q (log q - log p)` (Gu et al. 2023, section 2, arXiv:2306.08543), nats.

    inf, with a gradient that is not finite, where the teacher excludes what the student does not:
    exclude it on the student's side too, by `support`.
    """
    return kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, `beta KL(p, m) + (1 - beta) KL(q, m)`, nats.

    With `m = beta p + (1 - beta) q` (Agarwal et al. 2024, section 2, arXiv:2306.13649). Always
    finite. Over beta it tends to the forward KL as beta goes to 0, over 1 - beta to the reverse
    one as beta goes to 1.

    Args:
        log_p: [..., M] the teacher's.
        log_q: [..., M] the student's.
        beta: above 0, below 1.
    """
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skew_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """Skew KL, `KL(p, alpha p + (1 - alpha) q)` (Ko et al. 2024, section 3, arXiv:2402.03898).

    Nats, at most `log(1 / alpha)`, so finite whatever the student excludes; tends to the forward
    KL as alpha goes to 0.

    Args:
        log_p: [..., M] the teacher's.
        log_q: [..., M] the student's.
        alpha: above 0, below 1.
    """
    return kl(log_p, _log_mixture(log_p, log_q, alpha))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half of `sum |p - q|` (Wen et al. 2023, section 3, arXiv:2307.15190); 0 to 1, no nats."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """`log(share p + (1 - share) q)`; 0 for what both exclude, which no divergence reads."""
    possible = (log_p != -torch.inf) | (log_q != -torch.inf)
    return torch.logaddexp(
        math.log(share) + torch.where(possible, log_p, 0.0),
        math.log1p(-share) + torch.where(possible, log_q, 0.0),
    )


def chosen_measure(config: ObjectiveConfig) -> Measure:
    """The divergence that a configuration names, with its parameter."""
    return {
        "kl": kl,
        "reverse-kl": reverse_kl,
        "jsd": partial(jsd, beta=config.jsd_beta),
        "skew-kl": partial(skew_kl, alpha=config.skew_alpha),
        "tv": total_variation,
    }[config.divergence]


def divergence(
    student_logits: Tensor,
    teacher: TeacherDistribution,
    measure: Measure = kl,
    *,
    support: Tensor | None = None,
) -> Tensor:
    """How far the student is from a teacher, dense or with a ghost token for its tail.

    float32 or wider; not scaled: the objective applies T**2 once (Hinton et al. 2015,
    section 2, arXiv:1503.02531).

    Args:
        student_logits: [..., V], before temperature; -inf excludes an outcome.
        teacher: of the same positions, at the temperature at which the two are compared.
        measure: which divergence.
        support: [V] bool, False for ids that are no outcome at all (rows that pad an embedding
            table): they get no probability and no gradient. None: all are. Rows at the end can
            be cut off the logits instead.

    Returns:
        [...]; the objective sums them and divides by the count of the whole optimizer step.

    Raises:
        ValueError: if the shapes disagree.
    """
    ids = teacher.head_ids
    shape = tuple(teacher.log_probs.shape)
    # Of a sparse teacher only the positions can be compared.
    compared = student_logits.shape if ids is None else (*student_logits.shape[:-1], shape[-1])
    if tuple(compared) != shape:
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} against teacher log-probs of "
            f"shape {shape}: they must agree"
        )
    if ids is None:
        log_q = dense_log_probs(student_logits, teacher.temperature, support)
        return measure(teacher.outcome_log_probs, log_q)
    return head_divergence(
        head_log_probs(student_logits, ids, teacher.temperature, support), teacher, measure
    )


def head_divergence(log_q: Tensor, teacher: TeacherDistribution, measure: Measure) -> Tensor:
    """How far the student is from a sparse teacher, [...].

    Args:
        log_q: [..., K+1] of `head_log_probs`, the student's log-probs of head and ghost.
        teacher: with a head of the same ids.
        measure: which divergence.
    """
    return measure(_of_possible(teacher.outcome_log_probs, log_q), log_q)


def _of_possible(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The teacher given that its ghost is no outcome where it stands for none of the student's.

    So it is where the head holds every id of the student's, and the teacher gives mass to others:
    as a missing id is excluded from a whole distribution. Left in, it would cost the student
    infinitely much, whatever it learned. A teacher of nothing but the ghost keeps it.

    Args:
        log_p: [..., K+1] the teacher's, the ghost last.
        log_q: [..., K+1] the student's.
    """
    head = log_p[..., :-1].logsumexp(dim=-1, keepdim=True)
    is_excluded = (log_q.detach()[..., -1:] == -torch.inf) & (head != -torch.inf)
    ghost = log_p[..., -1:].masked_fill(is_excluded, -torch.inf)
    return torch.cat([log_p[..., :-1] - torch.where(is_excluded, head, 0.0), ghost], dim=-1)
