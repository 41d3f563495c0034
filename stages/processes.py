"""Processes that torchrun started to work together: which this one is, and what one does for all.

No torch at import: the command line asks which process prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from teacher_cache.cache.errors import TeacherCacheError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "seq_idx")  # no targets

# DistributedDataParallel's reducer holds its group as well. If the reducer is the last to let go,
# the group's threads are joined with the interpreter's lock held, and a thread that needs the lock
# to free what it gathered is waited for without end. Python's own reference lets go without it.
_groups_kept: list[object] = []


def num_processes() -> int:
    """How many processes train together; 1 without torchrun.

    As Accelerate sees it: a `WORLD_SIZE` without a `LOCAL_RANK` is somebody else's.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def num_local_processes() -> int:
    """How many of them this machine runs."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_processes() > 1 else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def local_rank() -> int:
    """Its number among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that locks, writes and prints for all."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Wait for all processes of this training, and let them exchange tensors in the body.

    Nothing is done where there is one process. After an error the group is left as it is: to take
    leave of the others, they would have to answer.

    Args:
        device: of this training: nccl connects CUDA devices, gloo CPUs.
    """
    if num_processes() > 1:
        import torch
        from torch import distributed

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
    from torch import distributed

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
