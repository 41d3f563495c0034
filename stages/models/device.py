"""Resolve the device and number format that a stage asked for."""

from __future__ import annotations

import platform
from typing import Any

import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.config import DeviceConfig


def resolve_device(config: DeviceConfig) -> torch.device:
    """The device to use.

    Raises:
        UserError: if CUDA was demanded and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda was demanded, and torch {torch.__version__} sees no CUDA device: "
            "install a CUDA build of torch on a machine with a GPU, or give --device auto"
        )
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def resolve_dtype(config: DeviceConfig, device: torch.device) -> torch.dtype:
    """The number format to use: float32 on CPU, bfloat16 on CUDA that has it, else float16.

    Raises:
        UserError: if float16 was demanded on a CPU, or bfloat16 on a GPU without it.
    """
    if config.dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16() else torch.float16
    dtype: torch.dtype = getattr(torch, config.dtype)
    if device.type == "cpu" and dtype is torch.float16:
        raise UserError(
            "--dtype float16 was asked for on a CPU, which computes it slowly or not at all: "
            "give --dtype float32 or bfloat16"
        )
    if device.type == "cuda" and dtype is torch.bfloat16 and not has_bfloat16():
        raise UserError(
            "--dtype bfloat16 was asked for, and this GPU does not compute it: give --dtype "
            "float16 or auto"
        )
    return dtype


def has_bfloat16() -> bool:
    """Whether the current GPU computes bfloat16 itself (Pascal and Turing only emulate it)."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16` or `float16`."""
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a forward pass depend on besides its settings (design: determinism)."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads()}
