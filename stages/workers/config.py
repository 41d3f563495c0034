"""How the shards of a cache are shared among workers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from teacher_cache.stages.config import StageConfig


class WorkersConfig(StageConfig):
    """Who makes the shards; no value depends on it."""

    slice: str | None = Field(
        default=None,
        description="Make one slice of the shards, i/n with i from 0: those whose number, modulo "
        "n, is i. The run that finds the other slices there finishes the cache. Default: all.",
    )
    executor: Literal["local", "ray"] = Field(
        default="local",
        description="Who makes the shards: this process, or each that torchrun started; or workers "
        "on Ray, a teacher each.",
    )
    ray_address: str | None = Field(
        default=None,
        description="Ray cluster to join, as auto or HOST:PORT. Default: one on this machine, for "
        "as long as the run takes.",
    )
    num_workers: int | None = Field(
        default=None,
        ge=1,
        description="Workers on Ray. Default: as many as the cluster's GPUs serve, or one.",
    )
    gpus_per_worker: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs of a worker on Ray; a part of one lets several share it. Default: 1 "
        "where the cluster has any, none with --device cpu.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of a teacher on a CPU. Default: what torch takes; on Ray one a "
        "worker.",
    )
