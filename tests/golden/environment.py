"""The environment in which the golden bits are the same on any x86-64 machine.

Libraries choose their code by what the processor offers, and the choices round differently. Each
setting takes the choice from one of them, so that all machines compute what the oldest one can.
They must be there before a process starts, so everything golden is made in one child process.
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
    # One thread: sums are not split. It is in the sidecars, too.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # torch's own kernels: no AVX2, no AVX512. With others, trained weights differ.
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


def differing(recorded: dict[str, str], names: tuple[str, ...]) -> str:
    """Which of these libraries is not the one that golden values were made with; empty if none."""
    found = installed()
    return ", ".join(
        f"{name} {found[name]} is not {recorded[name]}"
        for name in names
        if found[name] != recorded[name]
    )


def is_reproducible_here() -> bool:
    """Whether the settings reach all arithmetic: on x86-64 with glibc."""
    return platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"


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
