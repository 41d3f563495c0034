"""Which of the processes that torchrun started this one is. No torch here."""

from __future__ import annotations

import os


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
