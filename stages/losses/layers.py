"""How far the inside of a student is from its teacher's: maps row by row, states, pooled states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.losses.config import AttentionLoss
from teacher_cache.stages.losses.distributions import widened

SMOOTHING = 1e-6
"""Share of a student's row that is spread evenly for the KL: an entry that a strong decay has made
0 costs at most `log(n / SMOOTHING)` nats a unit of mass, not infinitely many."""


def normalised_rows(rows: Tensor, allowed: Tensor) -> Tensor:
    """Rows over what they may hold, each divided by its sum.

    Args:
        rows: [..., S] not negative.
        allowed: [..., S] bool; other entries become 0 and count for nothing.

    Returns:
        [..., S], float32 or wider; a row of zeros stays one and gets no gradient.
    """
    kept = widened(rows).masked_fill(~allowed, 0)
    total = kept.sum(-1, keepdim=True)
    is_empty = total == 0
    # Not only the result: 0 / 0 would make the gradient NaN, whatever is chosen afterwards.
    return (kept / total.masked_fill(is_empty, 1)).masked_fill(is_empty, 0)


def attention_distance(
    student: Tensor, teacher: Tensor, allowed: Tensor, *, loss: AttentionLoss
) -> Tensor:
    """Distance of each row of a map.

    `kl` is the forward KL from the teacher's row to the student's, smoothed by `SMOOTHING`;
    `frobenius` the squared norm of their difference, so that the mean over rows is the squared
    Frobenius norm over the number of rows (Bick et al. 2024, section 3.1, arXiv:2408.10189, match
    the norm itself); `cosine` is 1 - cosine.

    Args:
        student: [..., R, S] not negative, not normalised; carry the gradient.
        teacher: [..., R, S] of `allowed` entries alone, each row's sum 1, or 0 where it has none.
        allowed: [..., R, S] bool, entries that exist for both.
        loss: which distance.

    Returns:
        [..., R], float32 or wider; 0 for a row of which the teacher has nothing.

    Raises:
        ValueError: if the shapes disagree.
    """
    if not student.shape == teacher.shape == allowed.shape:
        raise ValueError(
            f"maps of shape {tuple(student.shape)} against the teacher's {tuple(teacher.shape)} "
            f"and a mask of {tuple(allowed.shape)}"
        )
    teacher = widened(teacher)
    has_teacher = (teacher != 0).any(-1)
    distances = _DISTANCES[loss](normalised_rows(student, allowed), teacher, allowed)
    return distances.masked_fill(~has_teacher, 0)


def _kl(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    evenly = allowed.to(student.dtype) / allowed.sum(-1, keepdim=True).clamp(min=1)
    smoothed = (1 - SMOOTHING) * student + SMOOTHING * evenly
    # Double where: the logarithm is only taken of what is above 0.
    counts = teacher > 0
    ratio = torch.where(counts, teacher, 1).log() - torch.where(counts, smoothed, 1).log()
    return (teacher * ratio).sum(-1)


def _frobenius(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    return (student - teacher).square().sum(-1)


def _cosine(student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


_DISTANCES: dict[AttentionLoss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "frobenius": _frobenius,
    "cosine": _cosine,
}


def hidden_distance(projected: Tensor, teacher: Tensor, sources: Tensor) -> Tensor:
    """One minus the cosine of each position's states, as pooled states are matched.

    Args:
        projected: [B, S', D] the student's, in its order and the teacher's width; carry the
            gradient.
        teacher: [B, S, D] as cached, in the teacher's order.
        sources: [B, S'] int64, where each of the student's positions comes from; negative where
            the teacher has none, or there is padding.

    Returns:
        [N] in 0..2, float32 or wider, one for each position that both have.

    Raises:
        ValueError: if the shapes disagree.
    """
    sample, position = (sources >= 0).nonzero(as_tuple=True)
    return pooled_distance(projected[sample, position], teacher[sample, sources[sample, position]])


def added_distance(student: Tensor, teacher: Tensor, before: Tensor) -> Tensor:
    """How far what a layer adds is from what the teacher's adds, of the size of the latter.

    `|s - t|^2 / |t - b|^2`, both layers having read `b`: 1 for a layer that adds nothing. Bick et
    al. 2024, section 3.2, arXiv:2408.10189, take the norm of the difference itself, in which the
    few positions of very large states count for nearly all.

    Args:
        student: [N, D] behind the student's layer; carry the gradient.
        teacher: [N, D] behind the teacher's.
        before: [N, D] before both.

    Returns:
        [N] not negative, float32 or wider; 0 where the teacher adds nothing.

    Raises:
        ValueError: if the shapes disagree.
    """
    if not student.shape == teacher.shape == before.shape:
        raise ValueError(
            f"states of shape {tuple(student.shape)}, {tuple(teacher.shape)} and "
            f"{tuple(before.shape)}"
        )
    student, teacher, before = (widened(one) for one in (student, teacher, before))
    added = (teacher - before).square().sum(-1)
    adds = added > 0
    apart = (student - teacher).square().sum(-1)
    return (apart / added.masked_fill(~adds, 1)).masked_fill(~adds, 0)


def pooled_distance(projected: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between the student's pooled states and the teacher's.

    As DistilBERT matches hidden states (Sanh et al. 2019, section 3, arXiv:1910.01108), here after
    a projection to the teacher's width. A vector of zeros is at distance 1 from every other.

    Args:
        projected: [B, D] the student's, in the teacher's width; carry the gradient.
        teacher: [B, D] as cached.

    Returns:
        [B] in 0..2, float32 or wider.

    Raises:
        ValueError: if the shapes disagree.
    """
    if projected.shape != teacher.shape:
        raise ValueError(
            f"pooled states of shape {tuple(projected.shape)} against the teacher's "
            f"{tuple(teacher.shape)}"
        )
    return 1 - F.cosine_similarity(widened(projected), widened(teacher), dim=-1)
