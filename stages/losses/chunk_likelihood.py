"""Approximate likelihood matching: compare how likely teacher and student hold a piece of text.

For models whose tokens differ. A chunk is text that both spell in whole tokens; each model gives it
a probability, the product of its tokens'. All that is not the chunk is merged into one other
outcome, so that a divergence of two outcomes remains (Minixhofer et al. 2025, "Cross-tokenizer
distillation via approximate likelihood matching", section 3, arXiv:2503.20083):

    p = p_teacher(chunk) ** (1 / tau)        q = p_student(chunk) ** (1 / tau)
    loss = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

with the forward KL for the paper's f-divergence, and without its correction for tokens that could
have gone on beyond the chunk's end. `tau` flattens the chunk's probability itself, not the
distribution over tokens: token log-probs are taken at temperature 1. It keeps the probabilities of
long chunks away from 0, where the second term alone would see nothing. The loss is not scaled by
`tau` and takes no T**2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teacher_cache.stages.losses.distributions import widened

DEFAULT_TAU = 100.0
"""The paper's."""
SHIFT = 1e-6
"""Nats by which both sides' `log p / tau` are lowered: a token of probability 1 in float32 would
otherwise make `log(1 - q)` infinite. A shift, not a clamp: the gradient stays, and the loss is
still 0 where the two agree."""


def chunk_log_likelihoods(
    next_log_probs: Tensor, chunk_index: Tensor, *, num_chunks: int
) -> Tensor:
    """Sum the log-probs of each chunk's tokens.

    Args:
        next_log_probs: [B, S] nats, at each position the log-prob of the token that follows.
        chunk_index: [B, S] int64, the chunk of the token that follows, -1 for none
            (`Chunks.index_of_positions`).
        num_chunks: chunks N of the sample that has most.

    Returns:
        [B, N] nats, float32 or wider; 0 for a chunk without tokens, which the loss masks.

    Raises:
        ValueError: if the shapes disagree or an index is beyond the chunks.
    """
    if next_log_probs.shape != chunk_index.shape:
        raise ValueError(
            f"log-probs of shape {tuple(next_log_probs.shape)}, chunk index of shape "
            f"{tuple(chunk_index.shape)}"
        )
    if chunk_index.numel() and not (
        int(chunk_index.min()) >= -1 and int(chunk_index.max()) < num_chunks
    ):
        raise ValueError(f"chunk index outside -1..{num_chunks - 1}")
    values = widened(next_log_probs)
    inside = chunk_index >= 0
    # What is in no chunk may be -inf or NaN (padding): replaced before the sum, not multiplied.
    values = torch.where(inside, values, 0.0)
    sums = values.new_zeros((*values.shape[:-1], num_chunks + 1))
    place = torch.where(inside, chunk_index, num_chunks)
    return sums.scatter_add(-1, place, values)[..., :num_chunks]


def chunk_likelihood_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, *, tau: float = DEFAULT_TAU
) -> Tensor:
    """The binarised forward KL from the teacher's chunk likelihoods to the student's.

    Args:
        student: [B, N] nats, `chunk_log_likelihoods`; carry the gradient.
        teacher: [B, N] nats, the same of the teacher's tokens; -inf where it rules a chunk out.
        mask: [B, N] bool, True for a chunk that both sides predict.
        tau: above 0; the larger, the flatter.

    Returns:
        [B, N] nats, 0 where `mask` is False; the objective sums them and divides by the count of
        the whole optimizer step.

    Raises:
        ValueError: if the shapes disagree or `tau` is not positive.
    """
    if not student.shape == teacher.shape == mask.shape:
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and mask "
            f"{tuple(mask.shape)}: the shapes must agree"
        )
    if not tau > 0:
        raise ValueError(f"tau is {tau}, but must be positive")
    log_p = torch.where(mask, widened(teacher) / tau, -1.0) - SHIFT
    log_q = torch.where(mask, widened(student) / tau, -1.0) - SHIFT
    # Double `where`: what the teacher rules out adds 0 to the first term, value and gradient.
    possible = log_p != -torch.inf
    safe_p = torch.where(possible, log_p, 0.0)
    match = torch.where(possible, safe_p.exp() * (safe_p - torch.where(possible, log_q, 0.0)), 0.0)
    # log_p < 0 by the shift, so the other outcome always has mass on both sides.
    other = -torch.expm1(log_p) * (_log1mexp(log_p) - _log1mexp(log_q))
    return torch.where(mask, match + other, 0.0)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)), x < 0, exact at both ends (Mächler 2012); double `where` for gradients."""
    near = values > -math.log(2)
    close = torch.where(near, values, -1.0)
    far = torch.where(near, -1.0, values)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))
