"""How far a student's hidden states are from its teacher's."""

from __future__ import annotations

from torch import Tensor

from teacher_cache.stages.losses.pooled import pooled_distance


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
