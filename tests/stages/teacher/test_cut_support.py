"""The teacher's ids among those of a longer table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.tokens.support import (
    CutSupport,
    MappedSupport,
    Support,
    files_of,
    states_support,
)
from teacher_cache.stages.tokens.vocabulary_map import VocabularyMap

SAME = VocabularyMap(
    student_ids=np.array([0, 1, -1, 3]),
    num_student_ids=7,
    teacher_sha256="0a",
    student_sha256="0b",
)


def test_what_the_teacher_lacks_is_excluded() -> None:
    support = CutSupport.by(SAME)
    assert (support.size, support.unused) == (7, (2, 4, 5, 6))
    logits = torch.tensor([[1.0, 2.0, 50.0, 3.0, 40.0]])  # rows 2 and 4 belong to no token
    below, outside = support.below_max(logits)
    inf = torch.inf
    assert below.tolist() == [[-2.0, -1.0, -inf, 0.0, -inf, -inf, -inf]]
    shares = logits.double().softmax(dim=1)[0]
    assert float(outside) == pytest.approx(float(shares[2] + shares[4]))
    log_probs, unmatched = support.log_probs(logits, 2.0)
    expected = (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 2).log_softmax(dim=0)
    assert log_probs[0, [0, 1, 3]].tolist() == pytest.approx(expected.tolist())
    assert unmatched.tolist() == [-inf]


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_head_has_rows_for_all_ids(has_bias: bool) -> None:
    support = CutSupport.by(SAME)
    weight, bias = torch.randn(5, 3), torch.randn(5) if has_bias else None
    states = torch.randn(4, 3)
    whole = LanguageModelHead(weight=weight, bias=bias)
    cut = whole.of_support(support)
    assert cut.weight.shape == (7, 3)
    logits = cut(states)
    assert torch.equal(logits[:, [0, 1, 3]], whole(states)[:, [0, 1, 3]])
    assert torch.isneginf(logits[:, [2, 4, 5, 6]]).all()


def test_another_map_is_another_support() -> None:
    cut = CutSupport.by(SAME)
    mapped = MappedSupport(teacher=Support(size=4), vocabulary_map=SAME)
    assert cut.settings["aligned"] == mapped.settings["aligned"] == SAME.support
    assert cut.settings != mapped.settings
    assert (
        mapped.settings
        != MappedSupport(teacher=Support(size=4, unused=(1,)), vocabulary_map=SAME).settings
    )
    assert {one.settings["student_sha256"] for one in (cut, mapped)} == {"0b"}
    assert list(files_of(cut)) == list(files_of(mapped)) == ["vocabulary_map.json"]
    assert not files_of(Support(size=4))


def test_an_id_that_the_model_has_no_row_of_maps_to_nothing() -> None:
    mapped = MappedSupport(teacher=Support(size=4, unused=(1,)), vocabulary_map=SAME)
    assert mapped.student_ids.tolist() == [0, -1, -1, 3]
    assert (mapped.num_reached, mapped.is_one_to_one) == (2, True)


def test_states_have_no_mapped_support() -> None:
    assert states_support(Support(size=4)) == Support(size=4)
    with pytest.raises(ValueError, match="cannot be mapped"):
        states_support(MappedSupport(teacher=Support(size=4), vocabulary_map=SAME))
