"""The backbone: packing, padding, what it returns, what it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers

from teacher_cache.stages.student import MambaStudentModel
from tests.tiny_students import small_student

BOTH = pytest.mark.parametrize("arch", ["mamba", "mamba2"])


@BOTH
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_samples_equal_samples_alone(arch, bidirectional) -> None:
    backbone = small_student(arch=arch, bidirectional=bidirectional).backbone.double()
    ids = torch.randint(0, 50, (1, 60))
    seq_idx = torch.tensor([0] * 25 + [1] * 35)[None]
    alone = [backbone(part).last_hidden_state for part in (ids[:, :25], ids[:, 25:])]
    packed = backbone(ids, seq_idx=seq_idx).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_on_either_side_changes_nothing(arch, bidirectional) -> None:
    backbone = small_student(arch=arch, bidirectional=bidirectional).backbone.double()
    ids = torch.randint(0, 50, (2, 11))
    expected = backbone(ids).last_hidden_state
    for left, right in ((5, 0), (0, 5), (3, 2)):
        padded = torch.nn.functional.pad(ids, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        got = backbone(padded, mask).last_hidden_state[:, left : left + 11]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_returns_the_residual_stream_and_a_state_where_asked() -> None:
    backbone = small_student().backbone
    ids = torch.randint(0, 50, (2, 7))
    plain = backbone(ids)
    assert plain.hidden_states is None and plain.cache_params is None
    full = backbone(ids, output_hidden_states=True, use_cache=True)
    streams = full.hidden_states
    assert len(streams) == 3 and torch.equal(streams[0], backbone.embedding(ids))
    assert torch.equal(backbone.norm_f(streams[-1]), full.last_hidden_state)
    assert torch.equal(full.last_hidden_state, plain.last_hidden_state)
    assert full.cache_params.has_previous_state(0)
    embedded = backbone(inputs_embeds=backbone.embedding(ids))
    assert torch.equal(embedded.last_hidden_state, plain.last_hidden_state)


def test_refuses_two_inputs_or_none_and_a_state_of_two_directions() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    backbone = small_student().backbone
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": backbone.embedding(ids)}):
        with pytest.raises(ValueError, match="one of the two"):
            backbone(**inputs)
    with pytest.raises(ValueError, match="no state"):
        small_student(bidirectional=True).backbone(ids, use_cache=True)


@BOTH
def test_a_classifiers_folder_is_also_a_backbone(arch, tmp_path) -> None:
    student = small_student(arch=arch)
    student.save_pretrained(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, MambaStudentModel)
    for name, weight in student.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], weight), name
