"""What machine and which versions the figures come from; names no host and no path."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    *("torch", "transformers", "numpy", "scikit-learn"),
    *("mambapy", "mamba-ssm", "causal-conv1d"),
)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine now: processor, cores, threads in use, load, memory, versions, date."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _from_proc("cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "memory_gb": round(_kilobytes("MemTotal") / 1e6, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    return found | {name: _version(name) for name in LIBRARIES}


def available_bytes() -> int:
    """Memory that this machine could give a process now; 0 where it cannot be told."""
    return _kilobytes("MemAvailable") * 1000


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _from_proc(file: str, field: str) -> str | None:
    """The first value of a field in one of Linux's `/proc` files, or none."""
    path = Path("/proc") / file
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def _kilobytes(field: str) -> int:
    value = _from_proc("meminfo", field)
    return int(value.split()[0]) if value else 0
