from __future__ import annotations

import pytest
import torch

from teacher_cache.stages.losses.layers import hidden_distance
from tests import reference_losses as reference


def test_each_position_against_its_source() -> None:
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 3, 3, generator=generator).half()
    sources = torch.tensor([[1, 2, 0, -1], [1, 0, -1, -1]])
    found = hidden_distance(projected, teacher, sources)
    pairs = [(b, i, j) for b in range(2) for i, j in enumerate(sources[b].tolist()) if j >= 0]
    expected = [
        1 - reference.cosine(projected[b, i].tolist(), teacher[b, j].tolist()) for b, i, j in pairs
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), projected)
    slow = torch.zeros_like(gradient)
    for b, i, j in pairs:
        direction = reference.cosine_gradient(projected[b, i].tolist(), teacher[b, j].tolist())
        slow[b, i] = -torch.tensor(direction)
    torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-6)


def test_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="against the teacher's"):
        hidden_distance(torch.ones(1, 1, 2), torch.ones(1, 1, 3), torch.zeros(1, 1).long())
