"""The environment in which the golden bits are the same on any x86-64 machine.

Libraries choose their code by what the processor offers, and the choices round differently. Each
setting takes the choice from one of them, so that all machines compute what the oldest one can.
They must be there before a process starts, so everything golden is made in one child process.

Tried on a machine with AVX2 by leaving one out at a time: without ATEN_CPU_CAPABILITY or MKL_CBWR
shards of all caches and the weights of all runs differ; without ONEDNN_MAX_CPU_ISA those of
classifiers; with two threads those of most. The settings of numpy, OpenBLAS and glibc change
nothing there, and stay for machines that offer more. No fingerprint and no setting of a run
depends on any of them.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]

_WITHOUT = ("AVX", "AVX2", "FMA", "FMA4", "AVX512F", "AVX2_Usable", "FMA_Usable", "FMA4_Usable")

ENVIRONMENT = {
    # One thread: sums are not split. Their number is in the sidecars, too.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # torch's own kernels: without AVX2 and AVX512.
    "ATEN_CPU_CAPABILITY": "default",
    # MKL, torch's matrix products: one branch for every processor.
    "MKL_CBWR": "COMPATIBLE",
    # oneDNN, which torch takes for some layers.
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    # numpy's kernels (its exp, its sums), by the names of 2.4, and its matrix products.
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Nehalem",
    # glibc's exp, log, sin and the like have variants with fused multiply-adds; torch calls them.
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in _WITHOUT),
    # No bits, but what could stand in the way: a GPU, a hub, threads before a fork.
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

SETTINGS_DEPEND_ON = ("tokenizers", "transformers")
"""Whose way of writing a tokenizer and a configuration is hashed in a fingerprint."""
BITS_DEPEND_ON = (
    *SETTINGS_DEPEND_ON,
    *("accelerate", "datasets", "numpy", "pyarrow", "safetensors", "torch", "zarr"),
)


def installed() -> dict[str, str]:
    """The versions of all that golden values depend on."""
    return {name: _version(name) for name in BITS_DEPEND_ON}


def float_functions() -> str:
    """Whose tanh, erf and the like of float32 torch calls: glibc 2.41 rounds many anew."""
    name, number = platform.libc_ver()
    parts = tuple(int(part) for part in number.split(".") if part.isdigit())
    if name != "glibc":
        return name or "unknown"
    return "glibc 2.41 or newer" if parts >= (2, 41) else "glibc before 2.41"


def differing(recorded: dict[str, str], names: tuple[str, ...]) -> str:
    """Which of these libraries is not the one that golden values were made with; empty if none."""
    found = installed()
    return ", ".join(
        f"{name} {found[name]} is not {recorded[name]}"
        for name in names
        if found[name] != recorded[name]
    )


def foreign_machine(recorded: str) -> str:
    """Why the settings cannot give the golden bits on this machine; empty if they can.

    Args:
        recorded: `float_functions` where the values were made.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"{platform.machine()} is not x86-64"
    found = float_functions()
    return "" if found == recorded else f"{found} is not {recorded}"


def run_module(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests in a child process with the environment."""
    return subprocess.run(
        [sys.executable, "-m", name, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
