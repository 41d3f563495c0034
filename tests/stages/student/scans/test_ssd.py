"""The chunked scan against the sequential loop in float64: output, every gradient, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.student.scans.recorded import Scanned
from teacher_cache.stages.student.scans.ssd import ssd_scan
from tests.reference import ssd_scan_loop

NAMES = ("x", "dt", "A", "B", "C", "D")


def random_inputs(
    seed: int, batch: int, length: int, heads: int, width: int, groups: int, states: int
) -> dict[str, Tensor]:
    """Inputs in float64 with step sizes from 1e-3 to about 3 and decay rates up to 16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    dt = torch.nn.functional.softplus(2 * normal(batch, length, heads) - 3)
    A = -torch.rand(heads, dtype=torch.float64, generator=generator) * 15 - 1
    return {
        "x": normal(batch, length, heads, width),
        "dt": dt,
        "A": A,
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
    }


def outputs_and_gradients(
    scan: Any, inputs: dict[str, Tensor], weight: Tensor, **options: Any
) -> dict[str, Any]:
    """The scan's output and the gradients of its weighted sum, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    positional = [leaves[name] for name in NAMES[:5]]
    y = scan(*positional, D=leaves["D"], **options)
    y = y.y if isinstance(y, Scanned) else y
    (y * weight.to(y.dtype)).sum().backward()
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@st.composite
def cases(draw: st.DrawFn, lengths: Any) -> tuple[dict[str, Tensor], Tensor | None, int]:
    """Inputs of any shape, `seq_idx` or none, and a chunk size."""
    seed = draw(st.integers(0, 2**31))
    batch, length = draw(st.integers(1, 3)), draw(lengths)
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width, states = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    inputs = random_inputs(seed, batch, length, groups * per_group, width, groups, states)
    seq_idx = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        runs = torch.rand(batch, length, generator=generator) < draw(st.sampled_from((0.02, 0.3)))
        seq_idx = runs.cumsum(1) % 2  # values come back: only a change counts
    return inputs, seq_idx, draw(st.sampled_from((1, 7, 16, 64)))


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@settings(max_examples=25)
@given(case=cases(st.integers(1, 300)))
def test_equals_the_loop_in_output_and_gradients(case, dtype, tolerance) -> None:
    check_against_the_loop(case, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@settings(max_examples=20)
@given(case=cases(st.integers(301, 2049) | st.sampled_from((1024, 2047, 2048, 2049))))
def test_equals_the_loop_on_long_sequences(case, dtype, tolerance) -> None:
    check_against_the_loop(case, dtype, tolerance)


def check_against_the_loop(case: Any, dtype: torch.dtype, tolerance: float) -> None:
    inputs, seq_idx, chunk_size = case
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    # In the scan's own dtype: both sides weigh alike.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(inputs["x"].shape, dtype=dtype, generator=generator).double()
    got = outputs_and_gradients(ssd_scan, inputs, weight, seq_idx=seq_idx, chunk_size=chunk_size)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    exact["A"] = exact["A"].expand(inputs["dt"].shape)  # a leaf of its own at each position
    expected = outputs_and_gradients(ssd_scan_loop, exact, weight, seq_idx=seq_idx)
    # These gradients are sums of terms of either sign. Where the terms cancel, a sum is no measure
    # of what rounding may do to it; their own size is.
    terms = {"A": expected["A"], "D": weight * exact["x"]}
    expected["A"] = expected["A"].sum((0, 1))
    for name, value in expected.items():
        # Where all decays are strong, A's gradient is next to nothing, and its size no measure.
        size = max(terms.get(name, value).norm().item(), 1e-3)
        assert (got[name] - value).norm().item() <= tolerance * size, name
        assert got[name].dtype == dtype


def test_a_gradient_whose_terms_cancel_is_as_exact_as_its_terms() -> None:
    """The gradient of one head's D is a thousandth of the size of its 5,400 terms."""
    inputs = random_inputs(0, 3, 300, 1, 6, 1, 1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(inputs["x"].shape, dtype=torch.float32, generator=generator).double()
    x = inputs["x"].float().double()
    # D's gradient is their product's sum; this takes out of x what makes it more than 0.05.
    inputs["x"] = x - weight * ((weight * x).sum() - 0.05) / weight.square().sum()
    check_against_the_loop((inputs, None, 64), torch.float32, 1e-5)


@pytest.mark.parametrize("step", [0.0, 1e-30, 1e-3, 30.0, 1e4, 1e30])
def test_extreme_decays_stay_finite_and_exact(step) -> None:
    inputs = random_inputs(0, 2, 150, 2, 3, 1, 4)
    inputs["A"] = torch.tensor([-48.0, -1e-4], dtype=torch.float64)
    inputs["dt"] = torch.where(torch.rand(2, 150, 2) < 0.5, step, 0.01).double()
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    weight = torch.randn_like(inputs["x"])
    got = outputs_and_gradients(ssd_scan, inputs, weight, chunk_size=32)
    for name, value in got.items():
        assert value.isfinite().all(), name
    y = ssd_scan_loop(*(inputs[name] for name in NAMES[:5]), D=inputs["D"])
    assert (got["y"] - y).norm() <= 1e-5 * y.norm()


def test_no_gradient_is_subnormal() -> None:
    # One gradient in a hundred below 1e-38 makes the backward on a CPU several times slower.
    inputs = {name: t.float() for name, t in random_inputs(1, 1, 640, 4, 8, 1, 4).items()}
    inputs["dt"] = torch.full_like(inputs["dt"], 0.05)
    inputs["A"] = -torch.tensor([1.0, 4.0, 8.0, 16.0])
    weight = torch.zeros_like(inputs["x"])
    weight[:, -1] = 1e-6
    got = outputs_and_gradients(ssd_scan, inputs, weight)
    for name in ("x", "dt"):
        gradient = got[name].abs()
        assert not ((gradient > 0) & (gradient < torch.finfo(torch.float32).tiny)).any(), name


def test_packed_samples_equal_samples_alone() -> None:
    inputs = random_inputs(2, 1, 130, 2, 3, 1, 4)
    seq_idx = torch.tensor([0] * 50 + [1] * 70 + [2] * 10)[None]
    packed = ssd_scan(*(inputs[name] for name in NAMES[:5]), seq_idx=seq_idx, chunk_size=32).y
    for start, end in ((0, 50), (50, 120), (120, 130)):
        x, dt, B, C = (inputs[name][:, start:end] for name in ("x", "dt", "B", "C"))
        y = ssd_scan(x, dt, inputs["A"], B, C, chunk_size=32).y
        torch.testing.assert_close(packed[:, start:end], y, rtol=0, atol=1e-12)


def test_chunk_size_does_not_change_the_result() -> None:
    arguments = [random_inputs(3, 2, 100, 2, 3, 2, 4)[name] for name in NAMES[:5]]
    whole = ssd_scan(*arguments, chunk_size=100).y
    for chunk_size in (1, 9, 50, 64, 1000):
        torch.testing.assert_close(ssd_scan(*arguments, chunk_size=chunk_size).y, whole)


def test_computes_in_float32_under_autocast_and_for_half_inputs() -> None:
    inputs = random_inputs(4, 2, 70, 2, 8, 1, 4)
    arguments = [inputs[name].bfloat16() for name in NAMES[:5]]
    leaf = arguments[0].requires_grad_()
    plain = ssd_scan(*(tensor.float() for tensor in arguments)).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = ssd_scan(*arguments).y
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, plain)
    gradients = [torch.autograd.grad(y.sum(), leaf)[0] for y in (autocast, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.ones(2, 9, 2)}, r"dt is \[2, 9, 2\], expected \[2, 10, 2\]"),
        ({"A": torch.ones(3)}, r"A is \[3\], expected \[2\]"),
        ({"C": torch.ones(2, 10, 1, 3)}, r"C is"),
        ({"B": torch.ones(2, 10, 4)}, r"must be"),
        ({"x": torch.ones(2, 0, 2, 3)}, r"must be"),
    ],
)
def test_refuses_shapes_that_disagree(change, message) -> None:
    inputs = random_inputs(5, 2, 10, 2, 3, 1, 4) | change
    with pytest.raises(ValueError, match=message):
        ssd_scan(*(inputs[name] for name in NAMES[:5]))


def test_refuses_groups_and_chunks_that_do_not_fit() -> None:
    inputs = random_inputs(6, 1, 10, 2, 3, 3, 4)
    with pytest.raises(ValueError, match="2 heads do not divide into 3 groups"):
        ssd_scan(*(inputs[name] for name in NAMES[:5]))
    inputs = random_inputs(6, 1, 10, 2, 3, 1, 4)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd_scan(*(inputs[name] for name in NAMES[:5]), chunk_size=0)


@pytest.mark.parametrize(("length", "cut"), [(1, None), (40, 1), (40, 39), (200, 130)])
def test_a_state_carries_a_scan_on(length, cut) -> None:
    inputs = random_inputs(8, 2, length, 4, 3, 2, 5)
    seq_idx = torch.arange(length)[None].expand(2, length) // 37
    arguments = [inputs[name] for name in NAMES[:5]]
    whole = ssd_scan(*arguments, D=inputs["D"], seq_idx=seq_idx, chunk_size=16)
    state, outputs = None, []
    for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
        x, dt, A, B, C = (
            t if name == "A" else t[:, part] for name, t in zip(NAMES[:5], arguments, strict=True)
        )
        piece = ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D=inputs["D"],
            seq_idx=seq_idx[:, part],
            initial_state=state,
            chunk_size=16,
        )
        # A scan cannot see that its first position begins a sample: whoever cuts there starts anew.
        state = piece.final_state
        outputs.append(piece.y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole.y)
    torch.testing.assert_close(piece.final_state, whole.final_state)


def test_the_final_state_is_that_of_the_recurrence() -> None:
    inputs = {name: t.requires_grad_() for name, t in random_inputs(9, 2, 70, 2, 3, 1, 4).items()}
    state = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    for t in range(70):
        decay = (inputs["dt"][:, t] * inputs["A"]).exp()[..., None, None]
        written = (inputs["dt"][:, t, :, None] * inputs["x"][:, t])[..., None]
        state = state * decay + written * inputs["B"][:, t, :, None, :]
    for chunk_size in (16, 100):
        got = ssd_scan(*(inputs[name] for name in NAMES[:5]), chunk_size=chunk_size).final_state
        torch.testing.assert_close(got, state.detach())
        assert not got.requires_grad
