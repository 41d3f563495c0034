"""The chunked loss against torch's on all logits at once: value, both gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.losses.linear_head import linear_cross_entropy
from tests.largest_tensor import LargestTensor


def make_inputs(num: int, width: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(num, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(vocab, (num,), generator=generator)


def results(loss_of: Any, hidden: Tensor, weight: Tensor, factor: float = 1.0) -> list[Tensor]:
    """The loss, and the gradients of both inputs, of `factor` times the loss."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = loss_of(*leaves)
    (factor * loss).backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(one is not None and one.dtype == hidden.dtype for one in gradients)
    return [loss.detach(), *gradients]  # pyright: ignore[reportReturnType]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


@settings(max_examples=60)
@given(
    num=st.integers(0, 23),
    width=st.integers(1, 6),
    vocab=st.integers(1, 15),
    max_logits=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_any_chunks_give_torchs_loss_and_gradients(
    num: int, width: int, vocab: int, max_logits: int, seed: int
) -> None:
    hidden, weight, targets = make_inputs(num, width, vocab, seed)
    found = results(
        lambda h, w: linear_cross_entropy(h, w, targets, max_logits=max_logits), hidden, weight, 0.3
    )
    expected = results(lambda h, w: plain(h, w, targets), hidden, weight, 0.3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("scale", "tolerance"), [(1, 1e-5), (100, 1e-4)])  # logits of thousands
def test_float32_is_close_to_float64_however_sure_the_head_is(scale: int, tolerance: float) -> None:
    hidden, weight, targets = make_inputs(200, 16, 500)
    expected = results(lambda h, w: plain(h, w, targets), scale * hidden, weight)
    found = results(
        lambda h, w: linear_cross_entropy(h, w, targets, max_logits=5000),
        (scale * hidden).float(),
        weight.float(),
    )
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_comes_in_and_goes_out(dtype: torch.dtype) -> None:
    hidden, weight, targets = (one.to(dtype) if one.is_floating_point() else one
                               for one in make_inputs(50, 16, 100))  # fmt: skip
    expected = results(lambda h, w: plain(h, w, targets), hidden.double(), weight.double())
    loss, *gradients = results(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-5)
    for one, other in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(one, other.to(dtype), rtol=2e-2, atol=1e-3)


def test_autocast_changes_nothing() -> None:
    hidden, weight, targets = make_inputs(50, 16, 100)
    hidden, weight = hidden.float(), weight.float()
    expected = results(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (hidden @ weight.T).dtype == torch.bfloat16
        found = results(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_the_loss_is_the_same_bits() -> None:
    hidden, weight, targets = make_inputs(50, 16, 100)
    with_gradients = linear_cross_entropy(hidden.requires_grad_(), weight, targets, max_logits=900)
    assert with_gradients.requires_grad
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, max_logits=900)
    assert torch.equal(without, with_gradients) and not without.requires_grad


def test_only_the_gradient_that_is_needed() -> None:
    hidden, weight, targets = make_inputs(9, 4, 7)
    linear_cross_entropy(hidden.requires_grad_(), weight, targets).backward()
    expected = torch.autograd.grad(plain(hidden, weight, targets), hidden)[0]
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)
    (weight_gradient,) = torch.autograd.grad(
        linear_cross_entropy(hidden.detach(), weight.requires_grad_(), targets), weight
    )
    expected = torch.autograd.grad(plain(hidden, weight, targets), weight)[0]
    torch.testing.assert_close(weight_gradient, expected)


def test_no_tensor_is_larger_than_an_input_or_a_chunk() -> None:
    num, width, vocab = 300, 4, 500
    hidden, weight, targets = make_inputs(num, width, vocab)
    with LargestTensor() as plainly:
        results(lambda h, w: plain(h, w, targets), hidden, weight)
    assert plainly.num_elements == num * vocab
    with LargestTensor() as chunked:
        results(
            lambda h, w: linear_cross_entropy(h, w, targets, max_logits=6 * vocab), hidden, weight
        )
    assert chunked.num_elements == 6 * vocab


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets = make_inputs(9, 4, 7)
    with pytest.raises(ValueError, match=r"are not \[N, D\]|ids .* for"):
        linear_cross_entropy(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"ids \(8,\) for 9 positions"):
        linear_cross_entropy(hidden, weight, targets[:8])


@pytest.mark.gpu
@pytest.mark.parametrize("max_logits", [40_000, 2**24])
def test_cuda_equals_float64_and_bounds_its_memory(max_logits: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, targets = make_inputs(4096, 64, 20_000)
    expected = results(lambda h, w: plain(h, w, targets), hidden, weight)
    hidden, weight, targets = hidden.float().cuda(), weight.float().cuda(), targets.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = results(
            lambda h, w: linear_cross_entropy(h, w, targets, max_logits=max_logits), hidden, weight
        )
    peak = torch.cuda.max_memory_allocated() - before
    for one, other in zip(found, expected, strict=True):
        assert (one.double().cpu() - other).norm() <= 1e-5 * other.norm()
    # Leaves, gradients, scaled gradients: of each input's size; two chunks of logits beside them.
    assert peak <= 4 * (5 * (hidden.numel() + weight.numel()) + 3 * max_logits) + 2**26
