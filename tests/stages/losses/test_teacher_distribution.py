import math
from typing import Any

import pytest
import torch

from teacher_cache.stages.losses.distributions import TeacherDistribution


def sparse(**changes: Any) -> TeacherDistribution:
    """Two positions, the second with an empty slot; the head is sorted by id, not probability."""
    fields: dict[str, Any] = {
        "head_ids": torch.tensor([[1, 4], [7, -1]]),
        "log_probs": torch.tensor([[0.2, 0.5], [0.9, 0.0]]).log(),
        "tail_log_prob": torch.tensor([0.3, 0.1]).log(),
        "temperature": 2.0,
    }
    return TeacherDistribution(**fields | changes)


def test_the_ghost_token_comes_last_and_all_sum_to_1() -> None:
    outcomes = sparse().outcome_log_probs.exp()
    torch.testing.assert_close(outcomes, torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.0, 0.1]]))
    dense = TeacherDistribution.from_logits(torch.randn(3, 5), 2.0)
    assert dense.outcome_log_probs is dense.log_probs


def test_top_ids_are_outcomes_and_not_slots() -> None:
    assert sparse().top_ids().tolist() == [4, 7]
    dense = TeacherDistribution.from_logits(torch.tensor([[0.0, 2.0, 1.0]]), 1.0)
    assert dense.top_ids().tolist() == [1]
    empty = sparse(head_ids=-torch.ones(2, 2).long(), log_probs=torch.full((2, 2), -math.inf))
    assert empty.top_ids().tolist() == [-1, -1]


def test_a_part_of_the_positions() -> None:
    for where in (slice(1, 2), torch.tensor([False, True])):
        part = sparse().at_positions(where)
        assert part.outcome_log_probs.shape == (1, 3)
        assert part.top_ids().tolist() == [7] and part.temperature == 2.0
    logits = torch.randn(4, 5)
    part = TeacherDistribution.from_logits(logits, 2.0).at_positions(slice(2))
    assert torch.equal(part.log_probs, TeacherDistribution.from_logits(logits[:2], 2.0).log_probs)


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"tail_log_prob": None}, "a sparse teacher has head_ids and tail_log_prob"),
        ({"head_ids": None}, "a dense one neither"),
        ({"head_ids": torch.tensor([[1], [7]])}, r"head ids of shape \(2, 1\)"),
        ({"tail_log_prob": torch.zeros(2, 1)}, r"a tail of shape \(2, 1\)"),
        ({"temperature": 0.0}, "must be positive"),
        ({"temperature": math.nan}, "must be positive"),
    ],
)
def test_refuses_what_would_be_compared_wrongly(changes: dict[str, Any], saying: str) -> None:
    with pytest.raises(ValueError, match=saying):
        sparse(**changes)
