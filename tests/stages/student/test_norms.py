"""The hand-written norm against its definition under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from teacher_cache.stages.student.norms import RMSNorm


def definition(
    x: Tensor, gate: Tensor | None, weight: Tensor, epsilon: float, num_groups: int = 1
) -> Tensor:
    x = x if gate is None else x * F.silu(gate)
    parts = [
        part / (part.square().mean(-1, keepdim=True) + epsilon).sqrt()
        for part in x.chunk(num_groups, dim=-1)
    ]
    return torch.cat(parts, dim=-1) * weight


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_definition_in_value_and_gradient(gated, num_groups) -> None:
    norm = RMSNorm(6, epsilon=1e-3, num_groups=num_groups).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) if gated else None
    leaves = [x, norm.weight, *([gate] if gate is not None else [])]
    weight = torch.randn(2, 3, 6, dtype=torch.float64)
    got, expected = norm(x, gate), definition(x, gate, norm.weight, 1e-3, num_groups)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_half_inputs_are_normalised_in_float32_and_returned_as_the_weight() -> None:
    x = torch.randn(4, 64) * 1000  # its squares overflow float16
    norm = RMSNorm(64)
    torch.testing.assert_close(
        norm(x.half()), definition(x.half().float(), None, norm.weight, 1e-5)
    )
    assert norm.half()(x.half()).dtype == torch.float16
