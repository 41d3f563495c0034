"""What both mixers promise: causality, resets, padding, both directions."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.stages.student.mixers import Layout, reversed_positions
from tests.tiny_students import small_mixer

ARCHITECTURES = ("mamba", "mamba2")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_position_sees_nothing_after_itself(arch) -> None:
    module = small_mixer(arch)
    hidden = torch.randn(1, 40, 8, dtype=torch.float64)
    changed = hidden.clone()
    changed[:, 25:] += 1
    before, after = module(hidden, Layout()), module(changed, Layout())
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-14)
    assert (before[:, 25:] != after[:, 25:]).any(dim=-1).all()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_samples_equal_samples_alone_with_gradients(arch, bidirectional) -> None:
    module = small_mixer(arch, bidirectional=bidirectional)
    hidden = torch.randn(1, 43, 8, dtype=torch.float64)
    borders = ((0, 2), (2, 21), (21, 22), (22, 43))  # shorter and longer than the convolution
    seq_idx = torch.cat(
        [torch.full((end - start,), i % 2) for i, (start, end) in enumerate(borders)]
    )[None]
    packed = module(hidden, layout(hidden, seq_idx=seq_idx))
    alone = torch.cat(
        [module(hidden[:, start:end], layout(hidden[:, start:end])) for start, end in borders],
        dim=1,
    )
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    weight = torch.randn_like(packed)
    parameters = list(module.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((packed * weight).sum(), parameters),
        torch.autograd.grad((alone * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_masked_padding_on_the_left_changes_nothing(arch) -> None:
    module = small_mixer(arch)
    hidden = torch.randn(2, 12, 8, dtype=torch.float64)
    padded = torch.cat((torch.randn(2, 5, 8, dtype=torch.float64), hidden), dim=1)
    mask = torch.arange(17).expand(2, 17) >= 5
    expected, got = module(hidden, Layout()), module(padded, Layout(mask=mask))
    torch.testing.assert_close(got[:, 5:], expected, rtol=0, atol=1e-12)
    leaf = padded.requires_grad_()
    module(leaf, Layout(mask=mask))[:, 5:].sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (leaf.grad[:, :5] == 0).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_directions_are_a_forward_and_a_backward_scan(arch) -> None:
    module = small_mixer(arch, bidirectional=True)
    hidden = torch.randn(3, 9, 8, dtype=torch.float64)
    num_real = torch.tensor([9, 4, 1])
    got = module(hidden, layout(hidden, num_real=num_real))
    # Rows alone and flipped whole: nothing of theirs is padding.
    for row, length in enumerate(num_real.tolist()):
        alone = hidden[row : row + 1, :length]
        expected = module(alone, layout(alone))
        torch.testing.assert_close(got[row : row + 1, :length], expected, rtol=0, atol=1e-12)
    # The backward direction with the forward one's weights is the flipped forward one.
    one_way = small_mixer(arch)
    one_way.load_state_dict(
        {name: p for name, p in module.state_dict().items() if not name.startswith("reverse.")}
    )
    for name, parameter in module.get_submodule("reverse").named_parameters():
        parameter.data = module.get_parameter(name).data
    symmetric = module(hidden, layout(hidden))
    flipped = module(hidden.flip(1), layout(hidden)).flip(1)
    torch.testing.assert_close(symmetric, flipped, rtol=0, atol=1e-12)
    assert not torch.allclose(symmetric, one_way(hidden, Layout()))


def test_reversing_twice_is_the_identity_and_padding_stays() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]])
    positions = reversed_positions(mask.bool())
    assert positions.tolist() == [
        [3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 2, 0],
    ]  # fmt: skip
    rows = torch.randn(5, 4, 2)
    both = Layout(reversed_positions=positions)
    assert torch.equal(both.reverse(both.reverse(rows)), rows)


def layout(
    hidden: torch.Tensor,
    *,
    num_real: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> Layout:
    batch, length = hidden.shape[:2]
    num_real = torch.full((batch,), length) if num_real is None else num_real
    mask = torch.arange(length) < num_real[:, None]
    return Layout(seq_idx=seq_idx, reversed_positions=reversed_positions(mask))
