"""The selective scan against the sequential loop in float64: output, every gradient, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from teacher_cache.stages.student.scans import selective as selective_module
from teacher_cache.stages.student.scans.selective import selective_scan
from tests.reference import selective_scan_loop

NAMES = ("x", "dt", "A", "B", "C", "D")


def random_inputs(
    seed: int, batch: int, length: int, channels: int, states: int
) -> dict[str, Tensor]:
    """Inputs in float64 with step sizes from 1e-3 to about 3 and decay rates up to 48."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "x": normal(batch, length, channels),
        "dt": torch.nn.functional.softplus(2 * normal(batch, length, channels) - 3),
        "A": -torch.rand(channels, states, dtype=torch.float64, generator=generator) * 47 - 1,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
    }


def with_strides(tensor: Tensor) -> Tensor:
    """The same values, the last dimension with a stride of 2, the first one innermost."""
    order = [*range(1, tensor.ndim), 0]
    wide = tensor.permute(order).repeat_interleave(2, dim=-2 if tensor.ndim > 1 else 0)
    return wide.movedim(-1, 0)[..., ::2] if tensor.ndim > 1 else wide[::2]


def outputs_and_gradients(
    scan: Any, inputs: dict[str, Tensor], weight: Tensor, **options: Any
) -> dict[str, Any]:
    """The scan's output and last state and the gradients of its weighted sum, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    arguments = leaves
    if options.pop("strided", False):
        arguments = {name: with_strides(leaf) for name, leaf in leaves.items()}
    y, state = scan(*(arguments[name] for name in NAMES[:5]), D=arguments["D"], **options)
    (y * weight.to(y.dtype)).sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "final_state": state.detach()} | gradients


@st.composite
def cases(draw: st.DrawFn, lengths: Any) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Inputs of any shape, resets and an initial state or none, and a block's size."""
    seed = draw(st.integers(0, 2**31))
    batch, length = draw(st.integers(1, 3)), draw(lengths)
    channels, states = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    inputs = random_inputs(seed, batch, length, channels, states)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        runs = torch.rand(batch, length, generator=generator) < draw(st.sampled_from((0.02, 0.3)))
        options["seq_idx"] = runs.cumsum(1) % 2  # values come back: only a change counts
    if draw(st.booleans()):
        options["initial_state"] = torch.randn(batch, channels, states, generator=generator)
    return inputs, options, draw(st.sampled_from((1, 5, 20, 40_000)))


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@settings(max_examples=40)
@given(case=cases(st.integers(1, 100)), strided=st.booleans())
def test_equals_the_loop_in_output_and_gradients(case, strided, dtype, tolerance) -> None:
    check_against_the_loop(case, strided, dtype, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@settings(max_examples=20)
@given(case=cases(st.integers(101, 2049) | st.sampled_from((1024, 2047, 2048, 2049))))
def test_equals_the_loop_on_long_sequences(case, dtype, tolerance) -> None:
    check_against_the_loop(case, False, dtype, tolerance)


def check_against_the_loop(case: Any, strided: bool, dtype: torch.dtype, tolerance: float) -> None:
    inputs, options, block_size = case
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    weight = torch.randn_like(inputs["x"], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_module, "CPU_STEP", block_size)
        got = outputs_and_gradients(selective_scan, inputs, weight, strided=strided, **options)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    expected = outputs_and_gradients(selective_scan_loop, exact, weight, **options)
    for name, value in expected.items():
        # Where all decays are strong, A's gradient is next to nothing, and its size no measure.
        bound = tolerance * max(value.norm().item(), 1e-3)
        assert (got[name] - value).norm().item() <= bound, name
        assert got[name].dtype == dtype


@pytest.mark.parametrize("options", [{}, {"seq_idx": torch.tensor([[0, 0, 1, 0, 0]] * 2)}])
def test_gradients_pass_gradcheck(options) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(0, 2, 5, 3, 2).values()]
    options = options | {"initial_state": torch.ones(2, 3, 2, dtype=torch.float64)}

    def outputs(x, dt, A, B, C, D) -> Tensor:
        return selective_scan(x, dt, A, B, C, D=D, **options).y

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("step", [0.0, 1e-30, 1e-4, 1e2, 1e4, 1e30])
@pytest.mark.parametrize("rate", [-1e-4, -48.0, -1e6, -1e30])
def test_extreme_decays_stay_finite_and_exact(step, rate) -> None:
    inputs = random_inputs(0, 2, 50, 3, 4)
    inputs["A"][:2] = rate
    chosen = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs["dt"] = torch.where(chosen, step, 0.01).double()
    inputs = {name: tensor.float() for name, tensor in inputs.items()}
    weight = torch.randn_like(inputs["x"])
    got = outputs_and_gradients(selective_scan, inputs, weight)
    for name, value in got.items():
        assert value.isfinite().all(), name
    y, _ = selective_scan_loop(*(inputs[name] for name in NAMES[:5]), D=inputs["D"])
    assert (got["y"] - y).norm() <= 1e-5 * y.norm()


def test_nothing_is_subnormal() -> None:
    # Numbers below 1e-38 make a scan on a CPU several times slower.
    inputs = {name: t.float() for name, t in random_inputs(1, 1, 640, 4, 4).items()}
    inputs["x"][:, 8:] = 0  # all that is left is what decays
    inputs["dt"] = torch.full_like(inputs["dt"], 0.05)
    inputs["A"] = -torch.tensor([1.0, 4.0, 8.0, 16.0])[:, None].expand(4, 4)
    weight = torch.zeros_like(inputs["x"])
    weight[:, -1] = 1e-6
    got = outputs_and_gradients(selective_scan, inputs, weight)
    for name in ("y", "final_state", "x", "dt", "B", "C"):
        size = got[name].abs()
        assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any(), name


def test_packed_samples_equal_samples_alone() -> None:
    inputs = random_inputs(2, 1, 130, 3, 4)
    seq_idx = torch.tensor([0] * 50 + [1] * 70 + [2] * 10)[None]
    packed = selective_scan(*(inputs[name] for name in NAMES[:5]), seq_idx=seq_idx).y
    for start, end in ((0, 50), (50, 120), (120, 130)):
        x, dt, B, C = (inputs[name][:, start:end] for name in ("x", "dt", "B", "C"))
        y = selective_scan(x, dt, inputs["A"], B, C).y
        torch.testing.assert_close(packed[:, start:end], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "cut"), [(40, 1), (40, 39), (100, 64), (100, 70)])
def test_a_state_carries_a_scan_on(length, cut) -> None:
    inputs = random_inputs(8, 2, length, 3, 5)
    inputs["dt"] *= 0.05
    seq_idx = torch.arange(length)[None].expand(2, length) // 37
    sequences = [inputs[name] for name in ("x", "dt", "B", "C")]

    def scan(part: slice, **options: Any) -> Any:
        x, dt, B, C = (tensor[:, part] for tensor in sequences)
        return selective_scan(
            x, dt, inputs["A"], B, C, D=inputs["D"], seq_idx=seq_idx[:, part], **options
        )

    whole, first = scan(slice(None)), scan(slice(cut))
    # A scan cannot see that its first position begins a sample: no cut here falls on a border.
    second = scan(slice(cut, None), initial_state=first.final_state)
    torch.testing.assert_close(torch.cat([first.y, second.y], dim=1), whole.y)
    torch.testing.assert_close(second.final_state, whole.final_state)
    assert not second.final_state.requires_grad


def test_computes_in_float32_under_autocast_and_for_half_inputs() -> None:
    inputs = [random_inputs(4, 2, 70, 8, 4)[name].bfloat16() for name in NAMES]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    plain = selective_scan(*(leaf.float() for leaf in leaves[:5]), D=leaves[5].float()).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = selective_scan(*leaves[:5], D=leaves[5]).y
        within = torch.autograd.grad(autocast.sum(), leaves, retain_graph=True)
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, plain, rtol=0, atol=0)
    torch.testing.assert_close(within, torch.autograd.grad(plain.sum(), leaves), rtol=0, atol=0)


def test_keeps_memory_for_chunks_only() -> None:
    inputs = random_inputs(5, 2, 160, 64, 32)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(*leaves[:5], D=leaves[5])
    num_states = 2 * 160 * 64 * 32
    assert max(tensor.numel() for tensor in kept) <= num_states / selective_module.CHUNK * 1.1


class Layer(nn.Module):
    """As small a module as can hold a selective scan."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(6, 4))
        self.D = nn.Parameter(torch.rand(6))
        self.maps = nn.Linear(6, 14)

    def forward(self, x: Tensor, seq_idx: Tensor) -> Tensor:
        dt, B, C = self.maps(x).split((6, 4, 4), dim=-1)
        dt = nn.functional.softplus(dt)
        return selective_scan(x, dt, -self.A_log.exp(), B, C, D=self.D, seq_idx=seq_idx).y


@pytest.fixture
def layer_and_arguments() -> tuple[Layer, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Layer(), (torch.randn(2, 37, 6), torch.arange(37)[None].expand(2, 37) // 20)


def test_compiles_without_a_graph_break(layer_and_arguments) -> None:
    layer, (x, seq_idx) = layer_and_arguments
    # "aot_eager" traces forward and backward and needs no C++ compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = module(leaf, seq_idx)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(weight.grad.clone() for weight in layer.parameters())])
    torch.testing.assert_close(*results)


def test_exports_for_any_length(layer_and_arguments) -> None:
    layer, arguments = layer_and_arguments
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(layer, arguments, dynamic_shapes=(sizes, sizes))
    names = [str(node.target) for node in exported.graph.nodes]
    assert names.count("teacher_cache.selective_scan.default") == 1
    for length in (1, 9, 37, 64):
        x, seq_idx = torch.randn(3, length, 6), torch.arange(length)[None].expand(3, length) // 20
        torch.testing.assert_close(exported.module()(x, seq_idx), layer(x, seq_idx))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.ones(2, 9, 3)}, r"dt is \[2, 9, 3\], expected \[2, 10, 3\]"),
        ({"A": torch.ones(2, 4)}, r"A is \[2, 4\], expected \[3, 4\]"),
        ({"C": torch.ones(2, 10, 3)}, r"C is"),
        ({"A": torch.ones(3)}, r"must be"),
        ({"x": torch.ones(2, 0, 3)}, r"must be"),
    ],
)
def test_refuses_shapes_that_disagree(change, message) -> None:
    inputs = random_inputs(5, 2, 10, 3, 4) | change
    with pytest.raises(ValueError, match=message):
        selective_scan(*(inputs[name] for name in NAMES[:5]))
