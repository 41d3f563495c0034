"""Where the learned projection begins: a few student ids for every teacher id, with weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.tokens.token_bytes import TokenBytes
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap

FIRST_PIECE_WEIGHT = 0.9
"""Of a teacher token that the student spells in pieces: next to come is the first of them, so the
others share the rest, from which training can move the weight."""

_BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """At most M student ids for every teacher id.

    Attributes:
        student_ids: int64 [V_t, M], distinct in a row but for -1, an empty slot.
        weights: float32 [V_t, M], 0 in empty slots; a row sums to 1, or is empty.
    """

    student_ids: Tensor
    weights: Tensor


def candidates_of_map(exact: VocabularyMap) -> Candidates:
    """The fixed map itself: one student id, or none, of weight 1."""
    ids = torch.from_numpy(exact.student_ids)[:, None]
    return Candidates(student_ids=ids.clone(), weights=(ids >= 0).float())


def candidates_by_strings(
    teacher: TokenBytes, student: TokenBytes, exact: VocabularyMap, *, num_candidates: int
) -> Candidates:
    """The id of the same bytes alone; where there is none, the pieces in which they are spelt.

    The pieces are the longest student tokens from left to right, which needs no text and so takes
    bytes that are no characters; it is BPE's own segmentation mostly, not always. An added token
    without its like keeps an empty row: it is no text.

    Args:
        teacher: the teacher's table.
        student: the student's.
        exact: `exact_map` of the two.
        num_candidates: M, at least 1.
    """
    id_of = {
        data: token_id
        for token_id, data in reversed(list(enumerate(student.content)))
        if data is not None and token_id not in student.added
    }
    longest = max(map(len, id_of), default=0)
    ids = np.full((len(teacher), num_candidates), -1, dtype=np.int64)
    weights = np.zeros((len(teacher), num_candidates), dtype=np.float32)
    for teacher_id, data in enumerate(teacher.content):
        same = int(exact.student_ids[teacher_id])
        if same >= 0:
            row = [same]
        elif data is None or teacher_id in teacher.added:
            continue
        else:
            row = list(dict.fromkeys(_pieces(data, id_of, longest)))[:num_candidates]
        ids[teacher_id, : len(row)] = row
        weights[teacher_id, : len(row)] = _shares(len(row))
    return Candidates(student_ids=torch.from_numpy(ids), weights=torch.from_numpy(weights))


def candidates_by_embeddings(
    teacher: Tensor,
    student: Tensor,
    exact: VocabularyMap,
    *,
    num_candidates: int,
    sharpness: float = 20.0,
    num_anchors: int = 1024,
) -> Candidates:
    """Attention of every teacher token over the student's, by the anchors that both have.

    Two embedding tables have no axes in common, but tokens of the same bytes do: a token is
    described by its cosines to these anchors in its own table, and two tokens are alike where their
    descriptions are. A token with a like of the same bytes attends to it alone.

    Args:
        teacher: [V_t, D_t] embeddings.
        student: [V_s, D_s], of another width.
        exact: `exact_map`; its pairs are the anchors.
        num_candidates: M, at most V_s.
        sharpness: what the cosines of two descriptions are multiplied by before the softmax.
        num_anchors: evenly spaced among the pairs; all where there are no more.

    Raises:
        ValueError: if there is no anchor.
    """
    pairs = torch.from_numpy(exact.student_ids).to(teacher.device)
    matched = torch.nonzero(pairs >= 0)[:, 0]
    if not len(matched):
        raise ValueError("the two vocabularies share no string, so nothing anchors their tables")
    anchors = matched[:: -(-len(matched) // num_anchors)]
    fresh = torch.nonzero(pairs < 0)[:, 0]
    ours = _described(teacher[fresh], teacher[anchors])
    theirs = _described(student, student[pairs[anchors]])
    ids = torch.full((len(pairs), num_candidates), -1, device=teacher.device)
    weights = torch.zeros(ids.shape, device=teacher.device)
    ids[matched, 0] = pairs[matched]
    weights[matched, 0] = 1.0
    # In blocks: the similarities of all pairs would not fit.
    for rows, block in zip(fresh.split(_BLOCK_ROWS), ours.split(_BLOCK_ROWS), strict=True):
        values, ids[rows] = (block @ theirs.T).topk(num_candidates, dim=-1)
        weights[rows] = (sharpness * values).softmax(dim=-1)
    return Candidates(student_ids=ids, weights=weights)


def _described(embeddings: Tensor, anchors: Tensor) -> Tensor:
    """Unit vectors [V, A] of cosines to the anchors, less their mean."""
    unit = F.normalize(embeddings.float(), dim=-1)
    cosines = unit @ F.normalize(anchors.float(), dim=-1).T
    return F.normalize(cosines - cosines.mean(dim=-1, keepdim=True), dim=-1)


def _shares(num: int) -> list[float]:
    if num < 2:
        return [1.0] * num
    return [FIRST_PIECE_WEIGHT, *[(1 - FIRST_PIECE_WEIGHT) / (num - 1)] * (num - 1)]


def _pieces(data: bytes, id_of: dict[bytes, int], longest: int) -> list[int]:
    """The longest tokens from left to right; a byte that no token begins with ends it."""
    found, start = [], 0
    while start < len(data):
        lengths = range(min(longest, len(data) - start), 0, -1)
        length = next((n for n in lengths if data[start : start + n] in id_of), 0)
        if not length:
            break
        found.append(id_of[data[start : start + length]])
        start += length
    return found
