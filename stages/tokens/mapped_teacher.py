"""The teacher's distribution over the student's ids, in log space.

Masses of teacher ids that map to one student id add; what has no student id is never dropped or
spread over the rest: it is returned by itself at capture, and joins the tail, the ghost token of
docs/maths.md, section 5, at training time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from teacher_cache.stages.losses.distributions import widened


def project_logits(logits: Tensor, student_ids: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """Map a full distribution; what capture does before its top-k, so without a gradient.

    Args:
        logits: [..., V_t] over the teacher's support, divided by the temperature; -inf excludes.
        student_ids: [V_t] int64, of the `VocabularyMap`; -1 where a teacher id maps to none.
        num_rows: columns R_s of the student's logits.

    Returns:
        log-probs [..., R_s], nats, -inf where no teacher id maps; and the log of the mass [...]
        that maps to none. Together they sum to 1.

    Raises:
        ValueError: if a student id has no column, or `logits` other columns than the map ids.
    """
    if logits.shape[-1] != student_ids.shape[0]:
        raise ValueError(f"{logits.shape[-1]} columns, but the map has {student_ids.shape[0]} ids")
    _check_ids(student_ids, num_rows)
    log_probs = torch.log_softmax(widened(logits), dim=-1)
    unmatched = log_probs[..., student_ids < 0].logsumexp(dim=-1)
    mapped = log_probs.new_full((*log_probs.shape[:-1], num_rows), -torch.inf)
    # One column of every student id at a time: nearly all have one teacher id, and a scatter over
    # whole vocabularies takes ten times as long.
    for teacher_column, student_column in _columns(student_ids):
        added = log_probs.index_select(-1, teacher_column)
        sums = torch.logaddexp(mapped.index_select(-1, student_column), added)
        mapped = mapped.index_copy(-1, student_column, sums)
    return mapped, unmatched


def map_head(
    head_ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor, student_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Map a cached head; its unmatched mass and the whole tail become the student's tail.

    How much of the tail would map is unknown, since its ids are not cached: the ghost takes all.

    Args:
        head_ids: [..., K] int64, -1 where a slot is empty.
        log_probs: [..., K] nats, -inf where a slot is empty.
        tail_log_prob: [...] nats, of the mass outside the head.
        student_ids: [V_t] int64, of the `VocabularyMap`.

    Returns:
        student ids [..., K], distinct but for -1; log-probs [..., K] descending; the tail's
        log-prob [...]. Head and tail have the mass that they had.

    Raises:
        ValueError: if a head id is no id of the map.
    """
    _check_ids(head_ids, student_ids.shape[0])
    # One entry more, so that an empty slot's -1 finds itself.
    with_empty = torch.cat([student_ids, student_ids.new_full((1,), -1)])
    return merged_head(with_empty[head_ids], log_probs, tail_log_prob)


def merged_head(
    ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A head whose equal ids are one, and whose mass without an id is the tail's.

    Args:
        ids: [..., K] int64, -1 for none; they may repeat.
        log_probs: [..., K] nats, -inf where a slot is empty.
        tail_log_prob: [...] nats, of the mass outside the head.

    Returns:
        ids [..., K], distinct but for -1; log-probs [..., K] descending; the tail's log-prob [...].
    """
    sorted_ids, order = ids.sort(dim=-1, stable=True)  # [..., K]
    starts = torch.ones_like(sorted_ids, dtype=torch.bool)
    starts[..., 1:] = sorted_ids[..., 1:] != sorted_ids[..., :-1]
    group = starts.cumsum(dim=-1) - 1  # [..., K] equal ids share a slot
    sums = scatter_logsumexp(widened(log_probs).gather(-1, order), group, ids.shape[-1])
    merged = torch.full_like(ids, -1).scatter(-1, group, sorted_ids)
    tail = torch.logaddexp(
        widened(tail_log_prob),
        torch.where(merged < 0, sums, -torch.inf).logsumexp(dim=-1),
    )
    by_prob, order = torch.where(merged < 0, -torch.inf, sums).sort(
        dim=-1, descending=True, stable=True
    )
    return merged.gather(-1, order), by_prob, tail


def coverage(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean teacher mass that maps into the student's vocabulary.

    Exact for a projected distribution; for a mapped head a lower bound, since its tail counts as
    unmapped.

    Args:
        log_probs: [..., K] mapped, nats.
        mask: [...] bool, the positions that count.

    Returns:
        Scalar in 0..1; NaN where no position counts.
    """
    return log_probs.logsumexp(dim=-1).exp()[mask].mean()


def scatter_logsumexp(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Logsumexp of the values that go to one place.

    Args:
        values: [..., N]; -inf adds nothing.
        index: [..., N] int64 in 0..size-1, the place of each.
        size: number of places.

    Returns:
        [..., size], -inf where nothing goes.
    """
    empty = values.new_full((*values.shape[:-1], size), -torch.inf)
    highest = empty.scatter_reduce(-1, index, values.detach(), "amax")
    shift = torch.where(highest == -torch.inf, 0.0, highest)  # -inf - -inf would be NaN
    weights = (values - shift.gather(-1, index)).exp()
    total = torch.zeros_like(empty).scatter_add(-1, index, weights)
    # Double `where`: log's gradient at 0 is infinite, and infinity times no gradient is NaN.
    reached = total > 0
    return torch.where(reached, torch.where(reached, total, 1.0).log() + shift, -torch.inf)


def _columns(student_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Teacher ids and their student ids, which are distinct in each pair of lists."""
    teacher_ids = torch.nonzero(student_ids >= 0)[:, 0]
    targets, order = student_ids[teacher_ids].sort(stable=True)
    teacher_ids = teacher_ids[order]
    # How many teacher ids before this one have the same student id.
    rank = torch.arange(len(targets), device=targets.device) - torch.searchsorted(targets, targets)
    for wanted in range(int(rank.max()) + 1 if len(rank) else 0):
        yield teacher_ids[rank == wanted], targets[rank == wanted]


def _check_ids(ids: Tensor, num_ids: int) -> None:
    """Ids are checked, never clamped: a clamped id is another token."""
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < num_ids):
        raise ValueError(f"ids {int(ids.min())}..{int(ids.max())}, but there are {num_ids}")
