"""Processes that train one model together: what one does for all, and who trains on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from teacher_cache.cache.errors import TeacherCacheError
from teacher_cache.stages.ranks import is_main, local_rank, num_processes

Result = TypeVar("Result")

MODEL_INPUTS = ("input_ids", "attention_mask", "seq_idx")  # of a batch, what is no target

# DistributedDataParallel's reducer holds its group as well. If the reducer is the last to let go,
# the group's threads are joined with the interpreter's lock held, and a thread that needs the lock
# to free what it gathered is waited for without end. Python's own reference lets go without it.
_groups_kept: list[object] = []


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Wait for all processes of this training, and let them exchange tensors in the body.

    Nothing is done where there is one process. After an error the group is left as it is: to take
    leave of the others, they would have to answer.

    Args:
        device: of this training: nccl connects CUDA devices, gloo CPUs.
    """
    if num_processes() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(local_rank())
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        _groups_kept.append(distributed.group.WORLD)
    yield
    if num_processes() > 1:
        distributed.destroy_process_group()


def outcome_of_main(act: Callable[[], Result]) -> Result:
    """Have the main process alone do something; its result, or its error, is everyone's.

    Raises:
        TeacherCacheError: what `act` raised in the main process.
    """
    if num_processes() == 1:
        return act()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = act()
        except TeacherCacheError as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def share_of(
    batch: dict[str, torch.Tensor], *, rank: int, num_processes: int
) -> dict[str, torch.Tensor]:
    """The samples of a batch that one process trains on: every `num_processes`-th from its own on.

    A batch may have none for it. Then it reads the first sample, so that its gradients are there
    to be averaged, and has no targets (none of 0 samples), so that they are zero.

    Args:
        batch: tensors of [B, ...] each, B at least 1.
        rank: of the process.
        num_processes: of the training.
    """
    if num_processes == 1:
        return batch
    share = {name: values[rank::num_processes] for name, values in batch.items()}
    if not len(share["input_ids"]):
        share |= {name: batch[name][:1] for name in MODEL_INPUTS if name in batch}
    return share
