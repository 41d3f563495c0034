"""From a run's options to those who make its shards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import Share
from teacher_cache.stages.cache_job import CacheJob
from teacher_cache.stages.config import flag_of
from teacher_cache.stages.processes import num_processes
from teacher_cache.stages.workers.alone import Alone
from teacher_cache.stages.workers.ranks import main_of_ranks

if TYPE_CHECKING:
    from teacher_cache.stages.cache_job import CacheTeacherConfig
    from teacher_cache.stages.workers.config import WorkersConfig
    from teacher_cache.stages.workers.interface import Workers

OF_RAY = ("ray_address", "num_workers", "gpus_per_worker")


def workers_of(config: CacheTeacherConfig) -> AbstractContextManager[Workers]:
    """Those who make the shards of a run, for as long as the body takes.

    Raises:
        UserError: for options that exclude each other, and as they start.
    """
    options = config.workers
    _refuse_what_excludes(options)
    if num_processes() > 1:
        return main_of_ranks(config)
    if options.executor == "ray":
        from teacher_cache.stages.workers.on_ray import workers_on_ray

        return workers_on_ray(config)
    share = Share() if options.slice is None else Share.parse(options.slice)
    return nullcontext(Alone(job=CacheJob.prepared(config), share=share))


def _refuse_what_excludes(options: WorkersConfig) -> None:
    shared_by = [
        *(["torchrun"] if num_processes() > 1 else []),
        *(["--executor ray"] if options.executor == "ray" else []),
        *([f"--slice {options.slice}"] if options.slice is not None else []),
    ]
    if len(shared_by) > 1:
        raise UserError(
            f"{' and '.join(shared_by)} each say who makes which shards: leave one of them out"
        )
    given = [name for name in OF_RAY if getattr(options, name) is not None]
    if given and options.executor != "ray":
        raise UserError(
            f"{flag_of(given[0])} is of --executor ray, and this is --executor "
            f"{options.executor}: leave it out, or give --executor ray"
        )
