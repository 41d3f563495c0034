"""Resolve the device and number format that a stage asked for, and let models run there."""

from __future__ import annotations

import functools
import inspect
import logging
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.config import DeviceConfig

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)

logger = logging.getLogger(__name__)


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


def recurrences_by_device(model: AnyModel) -> AnyModel:
    """Let one of transformers' models run its recurrences in PyTorch where it is on no GPU.

    transformers takes the functions of mamba-ssm, causal-conv1d and fla when they can be imported,
    whatever device a model is on, and they read a GPU's memory alone. So each is asked by call.

    Returns:
        The same model, of which nothing changes on a GPU.
    """
    for module, name, function in _recurrences(model):
        if inspect.getclosurevars(function).nonlocals["is_new_implementation"]:
            setattr(module, name, _by_device(function))
    return model


def warn_of_missing_kernels(model: torch.nn.Module, notes: Iterable[str]) -> None:
    """Say what could run a model's recurrences on its GPU and is not there.

    Args:
        model: by its class's name in the message.
        notes: what is missing, and why.
    """
    missing = "; ".join(notes)
    if missing:
        logger.warning(
            "%s runs in PyTorch what kernels run many times faster: %s (docs/gpu.md says how they "
            "are built)",
            type(model).__name__,
            missing,
        )


def missing_libraries(model: torch.nn.Module) -> list[str]:
    """What would run the recurrences of one of transformers' models on a GPU: of each a note."""
    known = [inspect.getclosurevars(function).nonlocals for _, _, function in _recurrences(model)]
    packages = {one["package"] for one in known if not one["is_new_implementation"]}
    return [f"{package} cannot be imported" for package in sorted(packages)]


def _recurrences(model: torch.nn.Module) -> Iterator[tuple[ModuleType, str, FunctionType]]:
    """Functions of a model's modules that transformers chose between a library's and its own."""
    for module in {sys.modules[type(one).__module__] for one in model.modules()}:
        for name, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and _is_chosen(function):
                yield module, name, function


def _is_chosen(function: FunctionType) -> bool:
    """Whether transformers' decorator made it, of which the plain function is `__wrapped__`."""
    decorator = "use_kernel_func_from_hub_with_fallback"
    return function.__code__.co_qualname.startswith(decorator) and hasattr(function, "__wrapped__")


def _by_device(kernel: Any) -> Callable[..., Any]:
    plain: Any = kernel.__wrapped__
    known = inspect.signature(plain).parameters

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if any(isinstance(one, torch.Tensor) and one.is_cuda for one in given):
            return kernel(*args, **kwargs)
        return plain(*args, **{name: one for name, one in kwargs.items() if name in known})

    return run
