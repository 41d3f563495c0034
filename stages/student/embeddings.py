"""A student's first embeddings made from its teacher's: a truncated SVD of the teacher's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TeacherEmbeddings:
    """Embeddings that start from a teacher's.

    Attributes:
        rows: [V, d_model], in the dtype of the fresh ones.
        energy_kept: share of the table's sum of squares that the student's width keeps, 0 to 1.
    """

    rows: Tensor
    energy_kept: float


@torch.no_grad()
def from_teacher(fresh: Tensor, table: Tensor) -> TeacherEmbeddings:
    """The teacher's table in the student's width, at the scale of fresh embeddings.

    With the table's SVD, `E = U S V^T`, the row of an id is its row of `U_k S_k = E V_k`: of all
    tables of rank k the one nearest to E (Eckart and Young 1936), so angles and relative distances
    between tokens are the teacher's as far as k dimensions hold them. It is then multiplied by one
    number that gives its entries the standard deviation of fresh ones (0.02 in mamba_ssm, about a
    mean of 0): every other initial weight, and the learning rate, was chosen for that.

    Where the teacher says nothing, the fresh values stay: in rows beyond its table, in rows that
    are all 0 there, and in the columns beyond its width, if that is smaller than `d_model`.

    V is found from the eigenvectors of `E^T E` in float64, D x D and not R x D; that loses
    singular values below 1e-8 of the largest, which no stored table resolves. A component's
    sign is arbitrary, and is chosen so that the largest entry of its column of V is positive.

    Args:
        fresh: [V, d_model], what the student would start from.
        table: [R, D], row i of token id i; rows beyond V are of no use to the student.

    Raises:
        ValueError: if the table is all 0.
    """
    exact = table[: len(fresh)].double()
    is_known = exact.any(dim=1)  # [R]
    if not is_known.any():
        raise ValueError("a table of zeros says nothing of any token")
    energies, components = torch.linalg.eigh(exact.T @ exact)  # ascending: [D], [D, D]
    width = min(fresh.shape[1], exact.shape[1])  # k
    leading = components.flip(1)[:, :width]
    largest = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True))  # [1, k]
    cut = exact @ (leading * largest.sign())  # [R, k]
    scale = _root_mean_square(fresh.double()) / _root_mean_square(cut[is_known])
    rows = fresh.clone()
    rows[: len(exact), :width][is_known] = (scale * cut[is_known]).to(fresh.dtype)
    energies = energies.clamp(min=0).flip(0)
    return TeacherEmbeddings(rows=rows, energy_kept=float(energies[:width].sum() / energies.sum()))


@torch.no_grad()
def side_by_side(table: Tensor, states: Tensor) -> Tensor:
    """The teacher's embeddings and its states of the same tokens as one table [R, D + P], float64.

    Each part counts as much as the other: its known rows are scaled to a mean squared norm of 1.
    The states are taken from their mean first, since what all tokens share tells none apart.

    Args:
        table: [R', D], the teacher's embeddings.
        states: [R, P], R at least R'; rows that are all 0 say nothing of their token, and stay 0.

    Raises:
        ValueError: if either is all 0, or the states have fewer rows.
    """
    if len(states) < len(table):
        raise ValueError(f"{len(states)} rows of states for {len(table)} of embeddings")
    is_known = states.any(dim=1)
    if not is_known.any():
        raise ValueError("states of zeros say nothing of any token")
    # One buffer, changed in place: of 150,000 tokens and twice 4,096 numbers it has 10 GB.
    joined = torch.zeros(len(states), table.shape[1] + states.shape[1], dtype=torch.float64)
    embeddings, centred = joined[:, : table.shape[1]], joined[:, table.shape[1] :]
    embeddings[: len(table)] = table
    centred.copy_(states)
    centred -= centred.sum(dim=0) / is_known.sum()
    centred[~is_known] = 0.0
    for part in (embeddings, centred):
        norms = torch.linalg.vector_norm(part, dim=1)
        part /= _root_mean_square(norms[norms > 0])
    return joined


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
