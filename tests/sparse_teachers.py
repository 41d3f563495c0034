"""Teachers cut to a head, as a codec would give them."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_cache.stages.losses.distributions import TeacherDistribution


def cut(logits: Tensor, head_ids: Tensor, temperature: float) -> TeacherDistribution:
    """Of [N, V] logits the outcomes in `head_ids` [N, K], and the logsumexp of the others."""
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    empty = head_ids < 0
    slots = torch.where(empty, 0, head_ids)
    inside = torch.zeros_like(log_p).scatter_add(-1, slots, (~empty).to(log_p.dtype)) > 0
    return TeacherDistribution(
        head_ids=head_ids,
        log_probs=log_p.gather(-1, slots).masked_fill(empty, -torch.inf),
        tail_log_prob=log_p.masked_fill(inside, -torch.inf).logsumexp(dim=-1),
        temperature=temperature,
    )


def top_k(logits: Tensor, k: int, temperature: float) -> TeacherDistribution:
    """The k most probable outcomes as the head."""
    return cut(logits, logits.topk(k, dim=-1).indices, temperature)
