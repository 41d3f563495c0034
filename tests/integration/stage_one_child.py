"""What a forked child does: stage one, with a place to die at and a log of what it computed."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from teacher_cache.cache.plan import Shard, ShardPlan
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.pipeline import cli, commands
from teacher_cache.stages import cache_teacher as stage_one
from teacher_cache.stages import convert as conversion
from teacher_cache.stages.cache_teacher import CacheTeacherConfig, StageOneObserver
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.teacher import classification, language_modeling
from teacher_cache.stages.teacher.load import Teacher, load_language_model, load_teacher
from tests.small_caches import set_shards_per_folder, without_token

HALF_WRITTEN, WRITTEN, RENAMED = "half-written", "written", "renamed"

# Loaded by the server, so that each child need not; some of them with maps.
teachers: dict[tuple[str, bool], Teacher] = {}

# Imported for `pipe`, which imports it late: a fork should find it loaded.
assert commands


class Steps(StageOneObserver):
    """Says what happens, a line each: `kept` and `forward` a shard, `step` of a commit.

    A step is named `<phase> <path in the cache> <how often that path was written before>`.

    Args:
        cache: whose files count.
        log: file that takes the lines.
        die_at: the step at which the process kills itself.
    """

    def __init__(self, cache: Path, log: Path, die_at: str | None):
        self._cache = cache
        self._log = log
        self._die_at = die_at
        self._times: Counter[str] = Counter()
        self._todo: list[tuple[str, int]] = []
        self._replace = os.replace

    def install(self) -> None:
        """Step between the process and the file system."""
        os.replace = self._on_replace
        os.fsync = self._on_fsync

    def on_plan(
        self, cache: Path, plans: dict[str, ShardPlan], kept: list[Sidecar], todo: list[Shard]
    ) -> None:
        self._todo = list(todo)
        for sidecar in kept:
            self._write(f"kept {sidecar.split} {sidecar.shard_idx}")

    def on_batch(self, num_samples: int, num_tokens: int) -> None:
        split, shard_idx = self._todo[0]
        self._write(f"forward {split} {shard_idx}")

    def on_shard(self, sidecar: Sidecar) -> None:
        assert (sidecar.split, sidecar.shard_idx) == self._todo.pop(0)

    def _on_fsync(self, descriptor: int) -> None:
        # Nothing is synced: what a killed process has written is safe, only a power cut loses it.
        inode = os.fstat(descriptor).st_ino
        for path in self._cache.rglob(".*.tmp"):
            target = path.with_name(without_token(path.name).removeprefix(".").removesuffix(".tmp"))
            for one in [path, *path.rglob("*")]:  # a shard may be a folder of files
                if one.is_file() and one.stat().st_ino == inode:
                    if self._step(HALF_WRITTEN, target / one.relative_to(path)):
                        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                        self._die()
                    return

    def _on_replace(self, source: Path, target: Path) -> None:
        if not Path(target).is_relative_to(self._cache):
            return self._replace(source, target)
        named = Path(target).with_name(without_token(Path(target).name))  # a folder put away
        if self._step(WRITTEN, named):
            self._die()
        self._replace(source, target)
        if self._step(RENAMED, named):
            self._die()
        self._times[str(named)] += 1

    def _step(self, phase: str, target: Path) -> bool:
        name = f"{phase} {target.relative_to(self._cache)} {self._times[str(target)]}"
        self._write(f"step {name}")
        return name == self._die_at

    def _write(self, line: str) -> None:
        with open(self._log, "a") as log:
            log.write(line + "\n")

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def warm_up(config: str) -> None:
    """Run stage one once, so that children find everything imported and compiled."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    resolved = CacheTeacherConfig.model_validate_json(config)
    stage_one.run(resolved)
    _loaded(resolved)


def _loaded(config: CacheTeacherConfig) -> Teacher:
    load = load_teacher if config.task == "classification" else load_language_model
    with_attention = config.layers.attention != "none"
    key = (config.forward.teacher, with_attention)
    if key not in teachers:
        teachers[key] = load(config.forward, with_attention=with_attention)
    return teachers[key]


def cache_teacher(config: str, log: str, shards_per_folder: int, die_at: str | None = None) -> None:
    """Stage one, from a configuration in JSON with `out` given."""
    set_shards_per_folder(setattr, shards_per_folder)
    resolved = CacheTeacherConfig.model_validate_json(config)
    out = resolved.shards.out
    assert out is not None
    steps = Steps(out, Path(log), die_at)
    steps.install()
    _use_loaded(resolved)
    stage_one.run(resolved, steps)


def cache_slice(config: str) -> None:
    """Stage one, from a configuration in JSON, beside other processes on the same cache."""
    os.fsync = lambda descriptor: None  # pyright: ignore[reportAttributeAccessIssue]
    resolved = CacheTeacherConfig.model_validate_json(config)
    _use_loaded(resolved)
    stage_one.run(resolved)


def _use_loaded(config: CacheTeacherConfig) -> None:
    loaded: Any = _loaded(config)
    classification.load_teacher = lambda config, *, with_attention: loaded
    language_modeling.load_language_model = lambda config, *, with_attention: loaded


def convert(config: str, log: str, shards_per_folder: int, die_at: str | None = None) -> None:
    """`pipe convert`, from a configuration in JSON."""
    set_shards_per_folder(setattr, shards_per_folder)
    resolved = ConvertConfig.model_validate_json(config)
    steps = Steps(resolved.out, Path(log), die_at)
    steps.install()
    conversion.run(resolved, steps)


def pipe(arguments: list[str], output: str) -> None:
    """The command line, with all that it prints in a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["pipe", *arguments]
    cli.main()
