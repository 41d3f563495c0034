"""Next tokens' log-probs by a linear head against the whole logits, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher_cache.stages.losses.linear_head import linear_next_log_probs


def made(num: int = 7, width: int = 5, size: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(size, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(size, (num,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


@pytest.mark.parametrize("max_logits", [1, 33, 10_000])
def test_equals_the_whole_logits(max_logits: int) -> None:
    hidden, weight, ids = made()
    found = linear_next_log_probs(hidden, weight, ids, max_logits=max_logits)
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(len(ids)), ids]
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    # Not linear in the values, as the likelihood of a text is not.
    ours = torch.autograd.grad(((found * weights).sum() ** 2), (hidden, weight))
    theirs = torch.autograd.grad(((expected * weights).sum() ** 2), (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_positions_and_half_precision() -> None:
    hidden, weight, ids = made(num=0)
    found = linear_next_log_probs(hidden, weight, ids)
    found.sum().backward()
    assert found.shape == (0,) and weight.grad is not None and not weight.grad.any()
    hidden, weight, ids = made()
    narrow = linear_next_log_probs(hidden.bfloat16(), weight.bfloat16(), ids)
    assert narrow.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, ids = made()
    for wrong in ((hidden[:, :2], weight, ids), (hidden, weight, ids[:3])):
        with pytest.raises(ValueError, match=r"are not \[N, D\]|ids .* for"):
            linear_next_log_probs(*wrong)
