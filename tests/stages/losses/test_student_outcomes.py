"""The student's head and ghost token against plain autograd in float64, and where that is hard."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.losses.distributions import dense_log_probs, head_log_probs


def plain(logits: Tensor, ids: Tensor, temperature: float, support: Tensor | None = None) -> Tensor:
    """Row by row from probabilities; the ghost token is the sum over the complement."""
    if support is not None:
        logits = torch.where(support, logits, -torch.inf)
    rows = []
    for q, row in zip(torch.softmax(logits / temperature, dim=-1), ids.tolist(), strict=True):
        inside = [idx for idx in row if idx >= 0]
        outside = [idx for idx in range(len(q)) if idx not in inside]
        head = [q[idx] if idx >= 0 else q.new_zeros(()) for idx in row]
        rows.append(torch.stack([*head, q[outside].sum()]))
    outcomes = torch.stack(rows)
    nothing = outcomes == 0  # whose logarithm would send NaN back
    return torch.where(nothing, 1.0, outcomes).log().masked_fill(nothing, -torch.inf)


def with_gradient(
    function: Any, logits: Tensor, weights: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The values, and the gradient of their sum by `weights` where they are finite."""
    leaf = logits.clone().requires_grad_()
    values = function(leaf, *arguments)
    finite = values.isfinite()
    (weights[finite] * values[finite]).sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


@settings(max_examples=80)
@given(
    num=st.integers(1, 4),
    vocab=st.integers(2, 9),
    head=st.integers(1, 9),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**31),
    empty=st.booleans(),
    supported=st.booleans(),
)
def test_equals_plain_autograd(
    num: int, vocab: int, head: int, temperature: float, seed: int, empty: bool, supported: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, vocab, generator=generator, dtype=torch.float64)
    order = torch.rand(num, vocab, generator=generator).argsort(dim=-1)
    ids = order[:, : min(head, vocab)]
    if empty:
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, -1, ids)
    support = None
    if supported:
        support = torch.rand(vocab, generator=generator) < 0.7
        support[0] = True
    weights = torch.randn(num, ids.shape[1] + 1, generator=generator, dtype=torch.float64)
    arguments = (logits, weights, ids, temperature, support)
    found, gradient = with_gradient(head_log_probs, *arguments)
    expected, expected_gradient = with_gradient(plain, *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_gradient_is_that_of_finite_differences(temperature: float) -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 6, 2], [5, 1, 0], [3, 2, 4]])
    support = torch.tensor([True, True, True, True, True, False, True])
    ids[1, 0] = 6  # inside the support: a log-prob of -inf has no finite differences
    assert torch.autograd.gradcheck(lambda z: head_log_probs(z, ids, temperature, support), logits)


def test_a_tail_of_1e_8_keeps_its_digits_in_float32() -> None:
    # `log(1 - sum q)` would be -inf here, or 6e-8: no digit of it right.
    logits = torch.tensor([[20.0, 19.0, 1.0, 0.5, -1.0, 0.0]])
    ids = torch.tensor([[0, 1]])
    weights = torch.tensor([[0.0, 0.0, 1.0]])  # the ghost token's alone
    found, gradient = with_gradient(head_log_probs, logits, weights, ids, 1.0)
    expected, expected_gradient = with_gradient(plain, logits.double(), weights.double(), ids, 1.0)
    assert 5e-9 < expected[0, 2].exp() < 5e-8
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    # Head: -q_i; tail: its softmax within the tail, less q_j, which is 1e-9.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-6, atol=0)


@pytest.mark.parametrize("gap", [80.0, 1e4])
def test_a_tail_that_underflows_is_still_no_nan(gap: float) -> None:
    logits = torch.tensor([[gap, 0.0, 1.0]])
    weights = torch.ones(1, 2)
    found, gradient = with_gradient(head_log_probs, logits, weights, torch.tensor([[0]]), 1.0)
    assert found[0, 0] == 0
    assert float(found[0, 1]) == pytest.approx(math.log(1 + math.e) - gap)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.2689414, 0.7310586]]))


def test_nothing_is_left_of_a_head_that_is_everything() -> None:
    logits = torch.randn(2, 4)
    logits[:, 3] = -math.inf
    every = torch.tensor([[3, 0, 2, 1], [0, 1, 2, -1]])  # the excluded one in the head, or not
    found, gradient = with_gradient(head_log_probs, logits, torch.ones(2, 5), every, 2.0)
    assert found[:, 4].tolist() == [-math.inf] * 2
    assert found[0, 0] == found[1, 3] == -math.inf
    dense = dense_log_probs(logits, 2.0)
    torch.testing.assert_close(found[1, :3], dense[1, :3])
    assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()


def test_the_support_takes_rows_out_of_both() -> None:
    logits = torch.randn(3, 6)
    logits[:, 5] = 50.0  # would hold all mass
    support = torch.arange(6) < 4
    weights = torch.randn(3, 6)
    dense, gradient = with_gradient(dense_log_probs, logits, weights, 2.0, support)
    torch.testing.assert_close(dense[:, :4], torch.log_softmax(logits[:, :4] / 2, dim=-1))
    assert (dense[:, 4:] == -math.inf).all() and (gradient[:, 4:] == 0).all()
    # A head that names an excluded id.
    ids = torch.tensor([[0, 5]] * 3)
    found, gradient = with_gradient(head_log_probs, logits, weights[:, :3], ids, 2.0, support)
    torch.testing.assert_close(found[:, 0], dense[:, 0])
    assert (found[:, 1] == -math.inf).all() and (gradient[:, 4:] == 0).all()
    cut, _ = with_gradient(head_log_probs, logits[:, :4], weights[:, :2], ids[:, :1], 2.0)
    torch.testing.assert_close(found[:, [0, 2]], cut)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_its_gradient_is_not(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5).to(dtype)
    ids, weights = torch.tensor([[0, 3], [2, 1]]), torch.randn(2, 3)
    found, gradient = with_gradient(head_log_probs, logits, weights, ids, 2.0)
    wide, wide_gradient = with_gradient(head_log_probs, logits.float(), weights, ids, 2.0)
    assert found.dtype is torch.float32 and gradient.dtype is dtype
    assert torch.equal(found, wide) and torch.equal(gradient, wide_gradient.to(dtype))


def test_more_dimensions_and_no_position_at_all() -> None:
    logits, ids = torch.randn(2, 3, 5), torch.randint(5, (2, 3, 1))
    found = head_log_probs(logits, ids, 1.0)
    flat = head_log_probs(logits.view(6, 5), ids.view(6, 1), 1.0)
    assert torch.equal(found.view(6, 2), flat)
    empty = logits[:0].requires_grad_()
    head_log_probs(empty, ids[:0], 1.0).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 3, 5)


def test_keeps_nothing_of_the_vocabularys_size() -> None:
    logits = torch.randn(4, 10_000, requires_grad=True)
    kept: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        head_log_probs(logits, torch.arange(8).repeat(4, 1), 2.0)
    large = [one for one in kept if one.numel() >= logits.numel()]
    assert [one.data_ptr() for one in large] == [logits.data_ptr()]
