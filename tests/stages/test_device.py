from __future__ import annotations

import platform

import pytest
import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.models.device import environment, resolve_device, resolve_dtype

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
