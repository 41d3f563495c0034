"""Inputs for the dispatched scans, and what a call of one returns: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ssd_inputs(
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    states: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Arguments of `dispatch.ssd`: parameters in float32, steps about as large as a model's."""
    return {
        "x": normal(batch, length, heads, width, dtype=dtype),
        "dt": normal(batch, length, heads, seed=1, dtype=dtype),
        "A": -normal(heads, seed=2).exp(),
        "B": normal(batch, length, groups, states, seed=3, dtype=dtype),
        "C": normal(batch, length, groups, states, seed=4, dtype=dtype),
        "D": normal(heads, seed=5),
        "dt_bias": normal(heads, seed=6) - 2,
    }


def selective_inputs(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of `dispatch.selective`, likewise."""
    return {
        "x": normal(batch, length, channels, dtype=dtype),
        "dt": normal(batch, length, channels, seed=1, dtype=dtype),
        "A": -normal(channels, states, seed=2).exp(),
        "B": normal(batch, length, states, seed=3, dtype=dtype),
        "C": normal(batch, length, states, seed=4, dtype=dtype),
        "D": normal(channels, seed=5),
        "dt_bias": normal(channels, seed=6) - 2,
    }


def scan_results(
    scan: Callable[..., Any], inputs: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """y and the final state, and the gradient of a weighted sum of y by each input."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    positional = [leaves[name] for name in ("x", "dt", "A", "B", "C")]
    y, final_state = scan(*positional, D=leaves["D"], dt_bias=leaves["dt_bias"], **options)
    assert not final_state.requires_grad
    weight = normal(*y.shape, seed=9, dtype=torch.bfloat16)  # exact in every dtype but float16,
    weight = weight.half().to(y.device, y.dtype)  # and in that one too from here on
    (y * weight).float().sum().backward()
    results = {"y": y.detach(), "final_state": final_state}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        results[f"grad_{name}"] = leaf.grad
    return results


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each result's error, relative to the norm of the expected one, is within `tolerance`."""
    for name, value in expected.items():
        norm = value.double().norm().item()
        error = (got[name].double() - value.double()).norm().item()
        assert error <= tolerance * norm, f"{name}: error {error:.2g}, norm {norm:.2g}"
