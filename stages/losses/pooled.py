"""How far the student's pooled state is from the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.losses.distributions import widened


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
