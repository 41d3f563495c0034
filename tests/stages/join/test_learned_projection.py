"""The learned projection against a float64 loop over probabilities, and where it begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher_cache.stages.tokens.mapped_teacher import map_head
from teacher_cache.stages.tokens.token_bytes import TokenBytes
from teacher_cache.stages.tokens.vocabulary_map import exact_map
from teacher_cache.stages.training.vocabulary_projection import (
    FIRST_PIECE_WEIGHT,
    Candidates,
    LearnedProjection,
    candidates_by_embeddings,
    candidates_by_strings,
    candidates_of_map,
    learned_share_at,
)

TEACHER = TokenBytes(
    content=(b"a", b" the", b" thermo", b"\xf0\x9f\x99", b"<t>", None, b"zz", b"b"),
    special=frozenset({4}),
)
STUDENT = TokenBytes(
    content=(b"<t>", b" the", b"r", b"mo", b"\xf0\x9f", b"\x99", b"b", b"a", b" t", b"m"),
)
EXACT = exact_map(TEACHER, STUDENT)
NUM_ROWS = len(STUDENT)

HEAD_IDS = torch.tensor([[[2, 0, 6, -1], [7, 4, 3, 1]]])
HEAD = torch.tensor([[[0.5, 0.2, 0.1, 0.0], [0.4, 0.3, 0.2, 0.1]]], dtype=torch.float64).log()
TAIL = torch.tensor([[0.2, 0.0]], dtype=torch.float64).log()


def _strings(num_candidates: int = 3) -> Candidates:
    return candidates_by_strings(TEACHER, STUDENT, EXACT, num_candidates=num_candidates)


def _projection() -> LearnedProjection:
    return LearnedProjection(candidates_of_map(EXACT), _strings()).double()


def _project(projection: LearnedProjection, share: float) -> tuple[Tensor, Tensor]:
    return _dense(*projection(HEAD_IDS, HEAD, TAIL, learned_share=share))


def _dense(ids: Tensor, log_probs: Tensor, ghost: Tensor) -> tuple[Tensor, Tensor]:
    """The head over all of the student's ids; an empty slot has no mass to add."""
    assert (log_probs[ids < 0] == -torch.inf).all()
    for row in ids.flatten(0, -2):
        assert len(row[row >= 0].unique()) == int((row >= 0).sum())
    shape = (*ids.shape[:-1], NUM_ROWS)
    probs = torch.zeros(shape, dtype=log_probs.dtype)
    probs = probs.scatter_add(-1, torch.where(ids < 0, 0, ids), log_probs.exp())
    return torch.where(probs > 0, torch.where(probs > 0, probs, 1.0).log(), -torch.inf), ghost


def test_strings_give_the_same_bytes_or_the_pieces() -> None:
    found = _strings()
    assert found.student_ids.tolist() == [
        [7, -1, -1],
        [1, -1, -1],
        [1, 2, 3],  # " the", "r", "mo"
        [4, 5, -1],  # part of a character
        [-1, -1, -1],  # an added token is no text, whatever the student's plain "<t>"
        [-1, -1, -1],
        [-1, -1, -1],  # nothing begins with a z
        [6, -1, -1],
    ]
    rest = (1 - FIRST_PIECE_WEIGHT) / 2
    assert found.weights[2].tolist() == pytest.approx([FIRST_PIECE_WEIGHT, rest, rest])
    assert _strings(1).weights[2].tolist() == [1.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_a_slow_loop(share: float) -> None:
    projection = _projection()
    with torch.no_grad():
        projection.scores.add_(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    learned = projection.learned_log_weights().exp().tolist()
    log_probs, ghost = _project(projection, share)
    for position in range(2):
        masses = [0.0] * NUM_ROWS
        lost = TAIL[0, position].exp().item()
        head = zip(HEAD_IDS[0, position].tolist(), HEAD[0, position].exp().tolist(), strict=True)
        for teacher_id, prob in head:
            if teacher_id < 0:
                continue
            same = int(EXACT.student_ids[teacher_id])
            lost += (1 - share) * prob * (same < 0)
            if same >= 0:
                masses[same] += (1 - share) * prob
            row = _strings().student_ids[teacher_id].tolist()
            lost += share * prob * (max(row) < 0)
            for slot, student_id in enumerate(row):
                if student_id >= 0:
                    masses[student_id] += share * prob * learned[teacher_id][slot]
        assert log_probs[0, position].exp().tolist() == pytest.approx(masses)
        assert ghost[0, position].exp().item() == pytest.approx(lost)
        assert sum(masses) + lost == pytest.approx(1.0)


def test_begins_as_the_fixed_map() -> None:
    log_probs, ghost = _project(_projection(), 0.0)
    ids, mapped, tail = map_head(HEAD_IDS, HEAD, TAIL, torch.from_numpy(EXACT.student_ids))
    expected = torch.zeros(1, 2, NUM_ROWS, dtype=torch.float64)
    expected.scatter_add_(-1, torch.where(ids < 0, 0, ids), mapped.exp())
    assert torch.allclose(log_probs.exp(), expected)
    assert torch.allclose(ghost, tail)


def test_learned_rows_begin_at_their_weights_and_sum_to_one() -> None:
    weights = _projection().learned_log_weights().exp()
    assert torch.allclose(weights, _strings().weights.double(), atol=1e-6)
    sums = weights.sum(dim=-1).tolist()
    assert sums == pytest.approx([1, 1, 1, 1, 0, 0, 0, 1])


def test_gradients_are_right_and_finite() -> None:
    projection = _projection()

    def projected(scores: Tensor) -> Tensor:
        arguments = (HEAD_IDS, HEAD, TAIL)
        named = {"learned_share": 0.6}
        out, ghost = _dense(
            *torch.func.functional_call(projection, {"scores": scores}, arguments, named)
        )
        return torch.cat([torch.where(out == -torch.inf, 0.0, out), ghost[..., None]], dim=-1)

    scores = projection.scores.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(projected, (scores,))
    (gradient,) = torch.autograd.grad(projected(scores).sum(), scores)
    assert torch.isfinite(gradient).all()
    assert gradient[[4, 5, 6]].abs().sum() == 0


def test_training_finds_the_row_that_the_student_says() -> None:
    """Its loss falls to the best that a row of these candidates can do."""
    projection = _projection()
    target = torch.full((NUM_ROWS,), 1e-9, dtype=torch.float64)
    target[[1, 2, 3]] = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.1)
    head = (torch.tensor([[2]]), torch.zeros(1, 1, dtype=torch.float64), TAIL[0, 1:])
    for _ in range(300):
        optimizer.zero_grad()
        log_probs, _ = _dense(*projection(*head, learned_share=1.0))
        reached = log_probs[0] != -torch.inf
        log_p = torch.where(reached, log_probs[0], 0.0)
        torch.where(reached, log_p.exp() * (log_p - target.log()), 0.0).sum().backward()
        optimizer.step()
    found = projection.learned_log_weights()[2].exp().tolist()
    assert found == pytest.approx([0.2, 0.5, 0.3], abs=0.01)


def test_embeddings_find_a_rotated_copy() -> None:
    """The student's table is the teacher's, shuffled and rotated; half of the pairs are known."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(60, 16, generator=generator)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    place = torch.randperm(60, generator=generator)
    student = torch.empty(60, 16)
    student[place] = teacher @ rotation
    names = [b"%d" % idx for idx in range(60)]
    there: list[bytes | None] = [None] * 60
    for idx in range(0, 60, 2):
        there[int(place[idx])] = names[idx]
    exact = exact_map(TokenBytes(content=tuple(names)), TokenBytes(content=tuple(there)))
    found = candidates_by_embeddings(teacher, student, exact, num_candidates=4)
    assert found.student_ids[:, 0].tolist() == place.tolist()
    assert torch.allclose(found.weights.sum(dim=-1), torch.ones(60))
    assert found.student_ids[0, 1:].tolist() == [-1, -1, -1]
    assert (found.student_ids[1::2] >= 0).all()
    few = candidates_by_embeddings(teacher, student, exact, num_candidates=4, num_anchors=15)
    assert np.mean((few.student_ids[:, 0] == place).tolist()) > 0.9
    nothing = exact_map(TokenBytes(content=(b"a",)), TokenBytes(content=(b"b",)))
    with pytest.raises(ValueError, match="share no string"):
        candidates_by_embeddings(teacher, student, nothing, num_candidates=1)


def test_the_schedule_moves_from_the_map_to_what_was_learned() -> None:
    shares = [learned_share_at(step, start=10, end=20) for step in (0, 10, 15, 20, 99)]
    assert shares == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert learned_share_at(5, start=5, end=5) == 1.0
    with pytest.raises(ValueError, match="before its start"):
        learned_share_at(0, start=2, end=1)


def test_what_does_not_fit_is_refused() -> None:
    projection = _projection()
    with pytest.raises(ValueError, match="expected 0 to 1"):
        _project(projection, 1.1)
    with pytest.raises(ValueError, match="head ids outside"):
        projection(HEAD_IDS + 5, HEAD, TAIL, learned_share=1.0)
