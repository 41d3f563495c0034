"""The kernels' layouts, dtypes and resets, with slow stand-ins in the kernels' place.

The stand-ins refuse what the libraries refuse; our PyTorch scans say what must come out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.stages.student.scans import dispatch, kernels
from tests import kernel_stand_ins as stand_ins
from tests.scan_calls import assert_close, normal, scan_results, selective_inputs, ssd_inputs

# A value that comes back (3, then 3 again) is another sample; none of them begins with 0.
SEQ_IDX = torch.tensor([[3] * 5 + [4] * 1 + [3] * 17, [7] * 23, [0] * 2 + [1] * 9 + [0] * 12])
LENGTH = SEQ_IDX.shape[1]


SSD_SIZES = (3, LENGTH, 4, 6, 2, 5)  # batch, length, heads, their width, groups, states
SELECTIVE_SIZES = (3, LENGTH, 6, 5)  # batch, length, channels, states

# Relative to the whole's norm. float32: a few sums of rounded terms. 16 bits: inputs are equal, so
# what differs is where gradients and outputs are rounded to 2^-8 (bfloat16) or 2^-11 (float16).
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_ssd(dtype: torch.dtype, seq_idx: Tensor | None) -> None:
    options: dict[str, Any] = {"seq_idx": seq_idx, "chunk_size": 16}
    kernel = partial(kernels.ssd, stand_ins.mamba_chunk_scan_combined)
    got = scan_results(kernel, ssd_inputs(*SSD_SIZES, dtype), **options)
    assert_close(
        got, scan_results(dispatch.ssd, ssd_inputs(*SSD_SIZES, dtype), **options), TOLERANCES[dtype]
    )


def test_ssd_kernel_would_mix_samples_whose_number_comes_back() -> None:
    """That is why the adapter counts changes: the stand-in compares values, as the kernel does."""

    def uncounted(*args: Any, **options: Any) -> Any:
        return stand_ins.mamba_chunk_scan_combined(*args, **options | {"seq_idx": SEQ_IDX})

    options: dict[str, Any] = {"seq_idx": SEQ_IDX, "chunk_size": 16}
    wrong = scan_results(partial(kernels.ssd, uncounted), ssd_inputs(*SSD_SIZES), **options)["y"]
    right = scan_results(dispatch.ssd, ssd_inputs(*SSD_SIZES), **options)["y"]
    assert torch.allclose(wrong[1], right[1], atol=1e-5)
    assert not torch.allclose(wrong[0], right[0], atol=1e-2)


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX, SEQ_IDX * 0], ids=["whole", "packed", "one"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_selective(dtype: torch.dtype, seq_idx: Tensor | None) -> None:
    kernel = partial(kernels.selective, stand_ins.selective_scan_fn)
    got = scan_results(kernel, selective_inputs(*SELECTIVE_SIZES, dtype), seq_idx=seq_idx)
    expected = scan_results(
        dispatch.selective, selective_inputs(*SELECTIVE_SIZES, dtype), seq_idx=seq_idx
    )
    assert_close(got, expected, TOLERANCES[dtype])


def test_selective_launches_a_few_padded_groups() -> None:
    shapes: list[tuple[int, ...]] = []

    def counted(*args: Any, **options: Any) -> Any:
        shapes.append(tuple(args[0].shape))
        return stand_ins.selective_scan_fn(*args, **options)

    kernel = partial(kernels.selective, counted)
    scan_results(kernel, selective_inputs(*SELECTIVE_SIZES), seq_idx=SEQ_IDX)
    # Samples of 23, 17, 12, 9, 5, 2 and 1 positions: 5 rows of 23 hold 66, a sixth 68.
    assert shapes == [(5, 6, 23), (2, 6, 2)]


def test_padding_gets_no_step_in_any_dtype() -> None:
    for dtype in TOLERANCES:
        raw = torch.tensor(kernels.NO_STEP, dtype=dtype).float()
        assert raw.isfinite() and F.softplus(raw + 100).item() == 0


def test_dtypes_are_settled_before_the_kernel() -> None:
    """As under autocast: sequences of several dtypes, parameters in 16 bits."""
    inputs = {
        name: tensor.bfloat16() for name, tensor in selective_inputs(*SELECTIVE_SIZES).items()
    }
    inputs |= {
        "dt": selective_inputs(*SELECTIVE_SIZES)["dt"],
        "B": selective_inputs(*SELECTIVE_SIZES)["B"],
    }
    kernel = partial(kernels.selective, stand_ins.selective_scan_fn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scan_results(kernel, inputs, seq_idx=None)
    assert got["y"].dtype == torch.bfloat16
    assert got["final_state"].dtype == got["grad_dt"].dtype == torch.float32

    inputs = ssd_inputs(*SSD_SIZES) | {
        "x": ssd_inputs(*SSD_SIZES)["x"].half(),
        "D": ssd_inputs(*SSD_SIZES)["D"].half(),
    }
    kernel = partial(kernels.ssd, stand_ins.mamba_chunk_scan_combined)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scan_results(kernel, inputs, seq_idx=SEQ_IDX, chunk_size=16)
    assert got["y"].dtype == torch.float16 and got["final_state"].dtype == torch.float32


def convolved(function: Any, x: Tensor, seq_idx: Tensor | None, **layout: Any) -> dict[str, Tensor]:
    """The convolution of a slice of a projection and the gradients, the output's one included."""
    offset, channels, width = layout["offset"], layout["channels"], layout["width"]
    projection = x.clone().requires_grad_()
    weight = normal(channels, 1, width, seed=1).requires_grad_()
    bias = normal(channels, seed=2).requires_grad_()
    y = function(projection[..., offset : offset + channels], weight, bias, seq_idx=seq_idx)
    # A concatenation hands back slices: a gradient with any stride, from any place.
    joined = torch.cat([x.new_zeros(*y.shape[:2], layout["beside"]), y], dim=-1)
    (joined.float() * normal(*joined.shape, seed=3)).sum().backward()
    grads = {"x": projection.grad, "weight": weight.grad, "bias": bias.grad}
    return {"y": y.detach()} | grads  # pyright: ignore


@pytest.mark.parametrize("length", [1, 2, LENGTH])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("total", "offset", "channels", "width", "beside"),
    [
        (16, 0, 16, 4, 0),
        (40, 16, 16, 4, 8),  # a slice that the kernel can read
        (43, 16, 16, 3, 3),  # a row stride that is no multiple of 8: it cannot
        (48, 3, 16, 2, 1),  # a first element that is not aligned
    ],
)
def test_convolution_of_slices(
    length: int, batch: int, total: int, offset: int, channels: int, width: int, beside: int
) -> None:
    x = normal(batch, length, total)
    layout = {"offset": offset, "channels": channels, "width": width, "beside": beside}
    kernel = partial(kernels.convolve, stand_ins.causal_conv1d_fn)
    for seq_idx in (None, SEQ_IDX[:batch, :length]):
        got = convolved(kernel, x, seq_idx, **layout)
        assert_close(got, convolved(dispatch.convolve, x, seq_idx, **layout), 1e-6)


def test_a_slice_that_fits_is_not_copied() -> None:
    projection = normal(3, LENGTH, 40)
    seen: list[int] = []

    def remember(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(x.data_ptr())
        return stand_ins.causal_conv1d_fn(x, *args, **options)

    x = projection[..., 16:32]
    kernels.convolve(remember, x, normal(16, 1, 4), None, seq_idx=SEQ_IDX)
    assert seen == [x.data_ptr()]


def test_stand_ins_refuse_what_the_adapter_mends() -> None:
    """So the tests above could fail: the same calls, unmended, are refused."""
    weight, x = normal(16, 4), normal(3, LENGTH, 43)[..., 16:32]
    for unfit in (x, normal(3, LENGTH, 48)[..., 3:19], x.contiguous()[..., :15]):
        with pytest.raises(ValueError, match="refuse"):
            stand_ins.causal_conv1d_fn(unfit.mT, weight[: unfit.shape[2]], activation="silu")
    with pytest.raises(ValueError, match="resets"):
        stand_ins.causal_conv1d_fn(
            x.contiguous().mT.contiguous(), weight, seq_idx=SEQ_IDX.int(), activation="silu"
        )
