"""What gradient checkpointing saves of a student's memory, and what it takes of time.

    python -m benchmarks.checkpointing [--batch 4] [--length 512] [--repeats 5]

The default student of each kind: one forward and backward with and without, interleaved. Bytes are
those that autograd keeps between the two, counted tensor by tensor (what shares storage once).
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.timing import interleaved
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import ARCHITECTURES, MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM


def kept_bytes(student: MambaStudentForCausalLM, ids: Tensor) -> int:
    """Bytes that the backward pass of one batch of ids [B, S] needs, weights apart."""
    weights = {one.untyped_storage().data_ptr() for one in student.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # The states alone: the logits' share depends on the vocabulary, and on who computes them.
        states = student(ids, states_only=True).final_states
    states.sum().backward()
    return sum(kept.values())


def seconds(student: MambaStudentForCausalLM, ids: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    started = time.process_time()
    student(ids, states_only=True).final_states.sum().backward()
    return time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Memory and time of gradient checkpointing.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe(torch.device("cpu")))
    repeats: dict[str, int] = dict.fromkeys(("plain", "checkpointed"), arguments.repeats)
    ids = torch.randint(0, 1000, (arguments.batch, arguments.length))
    for arch in ARCHITECTURES:
        students = {
            way: build_language_model(MambaStudentConfig(arch=arch, vocab_size=1000), seed=0)
            for way in repeats
        }
        students["checkpointed"].gradient_checkpointing_enable()
        for student in students.values():
            student.train()
        kept = {way: kept_bytes(student, ids) for way, student in students.items()}
        times = interleaved(
            {way: partial(seconds, student, ids) for way, student in students.items()}, repeats
        )
        plain, checkpointed = (statistics.median(times[way]) for way in students)
        print(
            f"{arch}, {arguments.batch} x {arguments.length}: {kept['plain'] / 1e6:.1f} MB kept, "
            f"checkpointed {kept['checkpointed'] / 1e6:.1f} MB "
            f"({kept['checkpointed'] / kept['plain']:.2f}); time {checkpointed / plain:.2f}"
        )


if __name__ == "__main__":
    main()
