"""A projection of the teacher's distribution to the student's ids that is trained with the student.

Sparse and row-stochastic: each teacher id spreads its mass over at most M student ids, by a softmax
over learned scores. It begins as the fixed map; a schedule moves from the map to what was learned.
The teacher's mass is kept at every step: what a row cannot place goes to the ghost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher_cache.stages.losses.distributions import widened
from teacher_cache.stages.tokens.mapped_teacher import merged_head
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
    bytes that are no characters; it is BPE's own segmentation mostly, not always. A special token
    without its like keeps an empty row: it is no text.

    Args:
        teacher: the teacher's table.
        student: the student's.
        exact: `exact_map` of the two.
        num_candidates: M, at least 1.
    """
    id_of = student.text_ids
    longest = max(map(len, id_of), default=0)
    ids = np.full((len(teacher), num_candidates), -1, dtype=np.int64)
    weights = np.zeros((len(teacher), num_candidates), dtype=np.float32)
    for teacher_id, data in enumerate(teacher.content):
        same = int(exact.student_ids[teacher_id])
        if same >= 0:
            row = [same]
        elif data is None or teacher_id in teacher.special:
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


_LOWEST_WEIGHT = 1e-4  # below it a candidate's score would be out of training's reach


class LearnedProjection(nn.Module):
    """Teacher ids to student ids by weights, in log space; an `Auxiliary` that makes targets."""

    name: ClassVar[str] = "projection"
    decays: ClassVar[bool] = False  # decay would spread every row evenly
    requests: ClassVar[Mapping[str, bool]] = MappingProxyType({})

    def __init__(self, fixed: Candidates, learned: Candidates | None = None):
        """Begin as the fixed map.

        Args:
            fixed: the map from which the schedule starts; its weights stay.
            learned: where the learned rows begin, `fixed` by default.
        """
        super().__init__()
        start = fixed if learned is None else learned
        used = start.student_ids >= 0
        scores = torch.where(used, start.weights.clamp_min(_LOWEST_WEIGHT).log(), 0.0)
        self.scores = nn.Parameter(scores)
        parts = (start.student_ids, start.weights)
        digest = hashlib.sha256(b"".join(one.numpy().tobytes() for one in parts))
        self._sha256 = digest.hexdigest()
        self.student_ids: Tensor
        self.fixed_ids: Tensor
        self.fixed_weights: Tensor
        self.register_buffer("student_ids", start.student_ids)
        self.register_buffer("fixed_ids", fixed.student_ids)
        self.register_buffer("fixed_weights", fixed.weights)

    @property
    def sha256(self) -> str:
        """Of the rows before the first step, which a run's settings record."""
        return self._sha256

    def heard(self, outputs: Any) -> None:
        """Nothing: it reads the teacher, not the student."""

    def learned_log_weights(self) -> Tensor:
        """[V_t, M] log of the learned weights; a row sums to 1, or is -inf throughout."""
        used = self.student_ids >= 0
        # A row without candidates would be NaN: it gets one score, which is masked again.
        some = used.any(dim=-1, keepdim=True)
        scores = torch.where(used | ~some, self.scores, -torch.inf)
        return torch.where(used, scores.log_softmax(dim=-1), -torch.inf)

    def forward(
        self,
        head_ids: Tensor,
        log_probs: Tensor,
        tail_log_prob: Tensor,
        *,
        learned_share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project a head to the student's ids.

        Args:
            head_ids: [..., K] int64 teacher ids, -1 in an empty slot.
            log_probs: [..., K] nats, -inf in an empty slot.
            tail_log_prob: [...] nats, of the mass outside the head.
            learned_share: 0 for the fixed map, 1 for the learned one (`learned_share_at`).

        Returns:
            student ids [..., N], distinct but for -1; log-probs [..., N], -inf in an empty slot;
            the ghost's log-prob [...]. Together they have the mass of head and tail.

        Raises:
            ValueError: if `learned_share` is not in 0..1 or a head id is none of the teacher's.
        """
        if not 0 <= learned_share <= 1:
            raise ValueError(f"learned_share is {learned_share}, expected 0 to 1")
        num_teacher = self.student_ids.shape[0]
        if head_ids.numel() and not (head_ids.min() >= -1 and head_ids.max() < num_teacher):
            raise ValueError(f"head ids outside -1..{num_teacher - 1}")
        parts = [
            _spread(head_ids, widened(log_probs) + math.log(share), ids, log_weights)
            for ids, log_weights, share in (
                (self.fixed_ids, _log_or_inf(self.fixed_weights), 1 - learned_share),
                (self.student_ids, self.learned_log_weights(), learned_share),
            )
            if share > 0
        ]
        places = torch.cat([place for place, _ in parts], dim=-1)
        masses = torch.cat([mass for _, mass in parts], dim=-1)
        return merged_head(places, masses, tail_log_prob)


def learned_share_at(step: int, *, start: int, end: int) -> float:
    """The schedule: the fixed map until `start`, the learned one from `end`, linear between.

    Raises:
        ValueError: if `end` comes before `start`.
    """
    if end < start:
        raise ValueError(f"the schedule ends at step {end}, before its start at {start}")
    if step >= end:
        return 1.0
    return max(step - start, 0) / (end - start)


def _spread(
    head_ids: Tensor, log_probs: Tensor, ids: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Student ids and masses [..., K*(M+1)] of what a head becomes; -1 is the ghost's."""
    empty = head_ids < 0
    rows = torch.where(empty, 0, head_ids)  # an empty slot has no mass, whatever row it reads
    unplaced = torch.where((ids >= 0).any(dim=-1), -torch.inf, log_weights.new_zeros(()))
    places = torch.cat([ids, torch.full_like(ids[:, :1], -1)], dim=-1)[rows]
    weights = torch.cat([log_weights, unplaced[:, None]], dim=-1)[rows]
    masses = torch.where(empty[..., None], -torch.inf, log_probs[..., None] + weights)
    return places.flatten(-2), masses.flatten(-2)


def _log_or_inf(weights: Tensor) -> Tensor:
    return torch.where(weights > 0, weights, 1.0).log().where(weights > 0, -torch.inf)
