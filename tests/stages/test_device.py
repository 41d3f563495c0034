from __future__ import annotations

import logging
import platform
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.mamba import modeling_mamba

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.models.device import (
    environment,
    missing_libraries,
    recurrences_by_device,
    resolve_device,
    resolve_dtype,
    warn_of_missing_kernels,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as asking goes, that has no bfloat16 of its own: a P100, say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # As torch answers on Pascal and Turing: emulated, it would be there.
    supported = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.fixture
def newer_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu() -> None:
    assert resolve_device(DeviceConfig()) == CPU
    with pytest.raises(UserError, match=r"--device cuda was demanded.*give --device auto"):
        resolve_device(DeviceConfig(device="cuda"))


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu() -> None:
    assert resolve_device(DeviceConfig()) == CUDA
    assert resolve_device(DeviceConfig(device="cuda")) == CUDA
    assert resolve_device(DeviceConfig(device="cpu")) == CPU


def test_a_cpu_computes_float32_unless_told() -> None:
    assert resolve_dtype(DeviceConfig(), CPU) == torch.float32
    assert resolve_dtype(DeviceConfig(dtype="bfloat16"), CPU) == torch.bfloat16
    with pytest.raises(UserError, match=r"--dtype float16 .* on a CPU.*give --dtype float32"):
        resolve_dtype(DeviceConfig(dtype="float16"), CPU)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_bfloat16_takes_float16() -> None:
    assert resolve_dtype(DeviceConfig(), CUDA) == torch.float16
    assert resolve_dtype(DeviceConfig(dtype="float32"), CUDA) == torch.float32
    with pytest.raises(UserError, match=r"--dtype bfloat16 .* does not compute it.*float16"):
        resolve_dtype(DeviceConfig(dtype="bfloat16"), CUDA)


@pytest.mark.usefixtures("newer_gpu")
def test_a_gpu_with_bfloat16_takes_it() -> None:
    assert resolve_dtype(DeviceConfig(), CUDA) == torch.bfloat16
    assert resolve_dtype(DeviceConfig(dtype="float16"), CUDA) == torch.float16


def test_what_the_bits_depend_on() -> None:
    found = environment(CPU)
    assert found == {"device": f"cpu: {platform.machine()}", "threads": torch.get_num_threads()}


class OnGpu(torch.Tensor):
    """Says of itself that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


RECURRENCES = ("causal_conv1d_fn", "mamba_inner_fn", "mamba_selective_scan")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Mamba where a library of kernels is installed, which read a GPU's memory."""

    def kernel(*_: Any, **__: Any) -> None:
        raise RuntimeError("Expected x.is_cuda() to be true")

    library = ModuleType("library_of_kernels")
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(library, "kernel", kernel, raising=False)
    chosen = use_kernel_func_from_hub_with_fallback("kernel", library.__name__)
    for name in RECURRENCES:
        plain: Any = getattr(modeling_mamba, name)
        monkeypatch.setattr(modeling_mamba, name, chosen(plain.__wrapped__))


def tiny_mamba() -> Any:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2)).eval()


@pytest.fixture
def expected() -> torch.Tensor:
    """Before any library of kernels was there."""
    return recurrences_by_device(tiny_mamba())(torch.arange(10)[None]).logits


def test_recurrences_run_wherever_a_model_is(expected: torch.Tensor, kernels: None) -> None:
    model = tiny_mamba()
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(torch.arange(10)[None])
    for _ in range(2):  # the second finds nothing to do
        model = recurrences_by_device(model)
    assert torch.equal(model(torch.arange(10)[None]).logits, expected)


def test_what_is_on_a_gpu_goes_to_the_kernel(kernels: None) -> None:
    recurrences_by_device(tiny_mamba())
    x, weight = torch.ones(1, 8, 5).as_subclass(OnGpu), torch.ones(8, 4)
    with pytest.raises(RuntimeError, match="is_cuda"):
        modeling_mamba.causal_conv1d_fn(x, weight, None, activation="silu")


def test_missing_kernels_are_named(
    kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = use_kernel_func_from_hub_with_fallback("scan", "kernels_that_nobody_has")
    plain: Any = modeling_mamba.mamba_selective_scan
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", absent(plain.__wrapped__))
    model = tiny_mamba()
    missing = missing_libraries(model)
    assert "kernels_that_nobody_has cannot be imported" in missing
    assert not any("library_of_kernels" in one for one in missing)
    with caplog.at_level(logging.WARNING):
        warn_of_missing_kernels(model, [])
        assert not caplog.messages
        warn_of_missing_kernels(model, missing)
    assert "MambaForCausalLM runs in PyTorch" in caplog.text and missing[-1] in caplog.text


def test_a_model_without_recurrences_misses_none() -> None:
    assert missing_libraries(torch.nn.Linear(1, 1)) == []
