"""Peak memory of one forward and backward, above that of a loaded model with its gradients.

On a CPU each measurement has a process of its own, forked from one that has imported everything
and computed nothing. A short sequence goes first, so that libraries and gradients have what they
keep; then Linux's mark of the process's most resident memory is set back, and one run moves it.
(`ru_maxrss` cannot be set back, and a child starts with its parent's.) Unlike torch's memory
profiler this counts what the libraries below torch allocate. Every tensor above 64 KiB gets pages
of its own, or what malloc keeps of freed ones would blur the growth with length. On a GPU it is
torch's own mark.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from benchmarks.backbones import BACKBONES, Sizes, forward_backward, random_ids
from benchmarks.timing import Shape

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
START_S = 300.0  # to import everything and build a model, on a slow and busy machine
OWN_PAGES = "MALLOC_MMAP_THRESHOLD_"  # glibc's; other allocators ignore it


@dataclass(frozen=True)
class Run:
    """One forward and backward.

    Attributes:
        seconds: it took, allocation included.
        peak_bytes: above the model with its gradients; none where that cannot be measured.
    """

    seconds: float
    peak_bytes: int | None


class NotFinished(Exception):
    """A run that had to be stopped, or was; the message says why."""


def run_on_cuda(model: nn.Module, shape: Shape, device: torch.device) -> Run:
    """Measure in this process.

    Raises:
        NotFinished: if the GPU's memory does not suffice.
    """
    forward_backward(model, random_ids(1, 8, device))
    ids = random_ids(shape.batch, shape.length, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        seconds = forward_backward(model, ids)
    except torch.OutOfMemoryError as error:
        raise NotFinished("the GPU's memory did not suffice") from error
    return Run(seconds, torch.cuda.max_memory_allocated(device) - before)


def run_in_child(backbone: str, sizes: Sizes, shape: Shape, *, threads: int, limit_s: float) -> Run:
    """Measure on the CPU, in a fresh process.

    Args:
        backbone: its key.
        sizes: of the model.
        shape: of the batch.
        threads: for torch.
        limit_s: after which the process is stopped.

    Raises:
        NotFinished: if it took longer, or was killed (for its memory, most likely).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(theirs, backbone, sizes, shape, threads))
    with _environment(OWN_PAGES, str(2**16)):
        child.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise RuntimeError(f"the process for {backbone} was not ready after {START_S:.0f} s")
        ours.recv_bytes()
        if not ours.poll(limit_s):
            raise NotFinished(f"stopped after {limit_s:,.0f} s, all that was left of its time")
        return ours.recv()
    except EOFError as error:
        child.join()
        if child.exitcode != -9:
            raise RuntimeError(f"{backbone} at {shape} failed; see above") from error
        raise NotFinished("killed by the system, for want of memory most likely") from error
    finally:
        child.kill()
        child.join()


def _measure(answer: Connection, backbone: str, sizes: Sizes, shape: Shape, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = BACKBONES[backbone].build(sizes).train()
    forward_backward(model, random_ids(1, 8, device))
    ids = random_ids(shape.batch, shape.length, device)
    answer.send_bytes(b"ready")
    before = _resident("VmRSS") if CLEAR.exists() else None
    if before is not None:
        CLEAR.write_text("5")  # sets VmHWM back to VmRSS: proc(5)
    seconds = forward_backward(model, ids)
    answer.send(Run(seconds, None if before is None else _resident("VmHWM") - before))


def _resident(field: str) -> int:
    """Bytes that a field of this process's status names."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
