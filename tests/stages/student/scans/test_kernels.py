"""Finding the kernels: once, late, and with every way in which a library can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from teacher_cache.stages.student.scans import kernels
from teacher_cache.stages.student.scans.kernels import CONVOLUTION, SELECTIVE, SSD, Kernel
from tests import kernel_stand_ins as stand_ins

ON_CPU = torch.zeros(1)
ALL = pytest.mark.parametrize("kernel", [SSD, SELECTIVE, CONVOLUTION], ids=lambda k: k.function)


@pytest.fixture(autouse=True)
def nothing_found_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_found", {})


@ALL
def test_finds_what_is_installed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    function, note = kernels.find(kernel, ON_CPU)
    assert function is getattr(stand_ins, kernel.function)
    assert note == {"mamba-ssm": "mamba-ssm 2.3.2"}.get(kernel.library, "causal-conv1d 1.7.0")


@ALL
def test_says_what_is_not_installed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    package = kernel.module.split(".")[0]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    assert kernels.find(kernel, ON_CPU) == (None, f"{kernel.library} is not installed")


@ALL
@pytest.mark.parametrize(
    "fault",
    [
        "raise ImportError('libtorch.so: undefined symbol: _ZN3c10')",
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "raise RuntimeError('0 active drivers ([]). There should only be one.')",
        "import no_such_compiler",
        "",  # imports, but lacks the function
    ],
)
def test_survives_a_library_that_is_broken(
    kernel: Kernel, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = kernel.module.split(".")[0]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / f"{package}.py").write_text(f"__path__ = []\n{fault}\n")
    monkeypatch.syspath_prepend(tmp_path)
    function, note = kernels.find(kernel, ON_CPU)
    assert function is None
    assert note.startswith(f"{kernel.library} cannot be used: ") and "\n" not in note
    if "symbol" in fault:
        assert note.endswith("ImportError: libtorch.so: undefined symbol: _ZN3c10")
    sys.modules.pop(package, None)


@ALL
def test_a_first_launch_that_fails_is_no_crash(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build for other GPUs, or a Triton without a compiler: the import is well."""
    stand_ins.install(monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.startswith(("mamba_", "causal_")):
            for name in ("rmsnorm_fn", "selective_scan_fn", "causal_conv1d_fn"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, fail)
    note = (
        f"{kernel.library} cannot be used: RuntimeError: CUDA error: no kernel image is available"
    )
    assert kernels.find(kernel, ON_CPU) == (None, note)


def test_numbers_that_are_not_finite_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    broken = sys.modules["causal_conv1d"]
    monkeypatch.setattr(broken, "causal_conv1d_fn", lambda x, *_, **__: x / 0 - x / 0)
    assert "not finite" in kernels.find(CONVOLUTION, ON_CPU).note


def test_looks_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[torch.device] = []
    kernel = Kernel(
        library="json", module="json", function="loads", try_out=lambda _, t: tries.append(t.device)
    )
    on: Any = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda:1")]
    for tensor in (on[0], on[0], on[1], on[0]):
        assert kernels.find(kernel, tensor).note.startswith("json 2.")
    assert tries == [torch.device("cpu"), torch.device("cuda:1")]


def test_without_cuda_nothing_of_the_libraries_is_imported(tmp_path: Path) -> None:
    """Libraries that cannot be imported lie in the way; every path is taken on CPU tensors."""
    for package in ("mamba_ssm", "causal_conv1d"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')\n")
    script = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from teacher_cache.stages.student.scans import dispatch\n"
        "o = torch.ones\n"
        "x, D = o(1, 4, 8), o(8)\n"
        "BC = o(1, 4, 1, 4)\n"
        "dispatch.ssd(o(1, 4, 2, 4), o(1, 4, 2), -D[:2], BC, BC, D=D[:2], dt_bias=D[:2],"
        " chunk_size=16)\n"
        "dispatch.selective(x, x, -o(8, 4), BC[:, :, 0], BC[:, :, 0], D=D, dt_bias=D)\n"
        "dispatch.convolve(x, o(8, 1, 4), D)\n"
        "print(*{'mamba_ssm', 'causal_conv1d'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()
