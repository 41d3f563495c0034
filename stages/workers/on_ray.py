"""Workers on Ray: actors that hold a teacher each, and shards that any of them can make.

Ray starts a worker again that died; which shard it was at, how often that was tried and when to
give up is counted here. A worker has one shard in hand at a time and writes it itself, so nothing
but sidecars comes back.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import Shard, Share
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.stages.cache_job import CacheTeacherConfig, Outline
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.teacher.task import Findings
from teacher_cache.stages.workers.remote import RemoteWorker, value_of

MAX_TRIES = 5  # of a shard, or of a call beside them, by workers that died at it
LOCAL = "local"

logger = logging.getLogger(__name__)


class OnRay:
    """Workers on a Ray cluster that this process has joined; `Workers`.

    Args:
        ray: the library.
        workers: handles of the actors.
    """

    share = Share()

    def __init__(self, ray: Any, workers: Sequence[Any]):
        self._ray = ray
        self._workers = workers

    @cached_property
    def outline(self) -> Outline:
        """Of the first worker; all others are compared with it."""
        return self._asked("outline")

    def write_teacher_files(self, folder: Path, intact: Collection[str]) -> None:
        """By the first worker."""
        self._asked("write_teacher_files", folder, intact)

    def make(self, todo: Sequence[Shard], on_batch: OnBatch) -> Iterator[Sidecar]:
        """Each worker its share, and then what is left of others' shares."""
        left = _Left(todo, self.outline, num_workers=len(self._workers))
        outline = self._ray.put(self.outline)
        in_hand: dict[Any, tuple[int, Shard]] = {}
        starting: dict[Any, int] = {}  # workers that are started again
        tries: Counter[Shard] = Counter()
        idle = list(range(len(self._workers)))
        while left or in_hand:
            while idle and left:
                number = idle.pop(0)
                shard = left.take(number)
                in_hand[self._workers[number].make.remote(outline, shard)] = number, shard
            (done,), _ = self._ray.wait([*in_hand, *starting], num_returns=1)
            if done in starting:
                idle.append(starting.pop(done))
                continue
            number, shard = in_hand.pop(done)
            try:
                answer = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                tries[shard] += 1
                self._count(tries[shard], f"shard {shard[1]} of {shard[0]}", error)
                left.put_back(shard)
                starting[self._started_again(number)] = number
                continue
            idle.append(number)
            sidecar: Sidecar = value_of(answer, logger.log)
            on_batch(sidecar.num_samples, sidecar.num_tokens)
            yield sidecar

    def found(self, sidecars: Sequence[Sidecar]) -> Findings | None:
        """By the first worker."""
        return self._asked("found", sidecars)

    def _asked(self, method: str, *arguments: Any) -> Any:
        """What the first worker says, or the one that was started in its place."""
        tries = 0
        while True:
            try:
                answer = self._ray.get(getattr(self._workers[0], method).remote(*arguments))
            except self._ray.exceptions.RayActorError as error:
                tries += 1
                self._count(tries, "preparing the teacher", error)
                self._ray.wait([self._started_again(0)])
            else:
                return value_of(answer, logger.log)

    def _started_again(self, number: int) -> Any:
        """What is there once a worker that died is; until then each call of it would fail."""
        return self._workers[number].is_there.options(max_task_retries=-1).remote()

    def _count(self, tries: int, what: str, error: Exception) -> None:
        found = str(error).strip().splitlines()
        reason = found[-1].strip() if found else type(error).__name__
        if tries == MAX_TRIES:
            raise UserError(
                f"{what} ended {tries} workers, one after another ({reason}): look at Ray's logs "
                "for what ends them; memory often does, then give fewer --num-workers or a smaller "
                "--batch-tokens. What was committed is kept, and the same command resumes from it"
            ) from error
        logger.warning("a worker died at %s (%s): it is tried again", what, reason)


class _Left:
    """Shards that nobody has in hand.

    Args:
        todo: all of them.
        outline: whose plans say whose share they are.
        num_workers: that share them.
    """

    def __init__(self, todo: Sequence[Shard], outline: Outline, *, num_workers: int):
        of_worker = {
            shard: number
            for number in range(num_workers)
            for shard in Share(idx=number, num=num_workers).of(outline.plans)
        }
        self._of_worker = of_worker
        self._shares: list[list[Shard]] = [[] for _ in range(num_workers)]
        for shard in reversed(todo):
            self._shares[of_worker[shard]].append(shard)

    def __bool__(self) -> bool:
        return any(self._shares)

    def take(self, number: int) -> Shard:
        """The next of a worker's share; where that is done, of the longest one."""
        return (self._shares[number] or max(self._shares, key=len)).pop()

    def put_back(self, shard: Shard) -> None:
        """One whose worker died: the next that is taken of its share."""
        self._shares[self._of_worker[shard]].append(shard)


@contextmanager
def workers_on_ray(config: CacheTeacherConfig) -> Iterator[OnRay]:
    """Join a cluster, or start one of this machine, with workers on it; leave it at the end.

    Raises:
        UserError: if Ray is not installed or cannot be joined, or lacks what the workers need.
    """
    ray = _library()
    options = config.workers
    with ExitStack() as stack:
        address = options.ray_address or LOCAL
        stack.enter_context(_joined(ray, address))
        found = ray.cluster_resources()
        num_gpus = int(found.get("GPU", 0))
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if num_gpus and config.forward.device != "cpu" else 0.0
        num_cpus = options.threads or 1
        num = options.num_workers or max(1, int(num_gpus / gpus) if gpus else 1)
        if num * num_cpus > found.get("CPU", 0) or num * gpus > num_gpus:
            needed = f"{num} workers need {num * num_cpus} CPUs and {num * gpus:g} GPUs"
            there = f"{found.get('CPU', 0):g} and {num_gpus}"
            if address == LOCAL:
                raise UserError(
                    f"{needed}, and this machine has {there}: give fewer --num-workers, fewer "
                    "--threads or --gpus-per-worker, or name a cluster by --ray-address"
                )
            logger.warning("%s, and the cluster has %s now: waiting for more", needed, there)
        worker = ray.remote(num_cpus=num_cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0)(
            RemoteWorker
        )
        # Ray sets the number of threads by its own rules, and a value depends on them.
        threads = config.model_copy(update={"threads": num_cpus})
        folder = str(Path.cwd())
        yield OnRay(ray, [worker.remote(threads, folder) for _ in range(num)])


def _library() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise UserError(
            "--executor ray needs Ray, which is not installed: pip install 'teacher-cache[ray]'"
        ) from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, in the body."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


@contextmanager
def _joined(ray: Any, address: str) -> Iterator[None]:
    """Be part of a cluster; one of this machine leaves neither processes nor files behind."""
    with ExitStack() as stack:
        more: dict[str, Any] = {}
        if address == LOCAL:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            )
            more = {"_temp_dir": folder, "include_dashboard": False}
            # Or Ray keeps a token of its own in the home folder, and tells its makers of the run.
            own = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
            stack.enter_context(_environment(own))
        stack.callback(ray.shutdown)
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **more)
        except (ConnectionError, RuntimeError, ValueError) as error:
            found = str(error).strip().splitlines()
            raise UserError(
                f"Ray at {address} cannot be joined ({found[0] if found else error!r}): check "
                "--ray-address, and that `ray status` shows a cluster there"
            ) from error
        yield
