"""Stage one: run the teacher once over the corpora and commit what it says, shard by shard.

What a cache will take can be estimated before: bytes, shards, what codec and maps lose. For that
nothing is fetched: what needs data or a teacher that is not on this machine is left open.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.plan import Shard, ShardPlan, documents_per_shard
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.cache_job import (
    NUM_MEASURED_FOR_SIZE,
    CacheTeacherConfig,
    load_corpora,
)
from teacher_cache.stages.codecs.measure import CodecLoss
from teacher_cache.stages.data.packaged import austen, reviews
from teacher_cache.stages.data.packaged.packages import assets_folder
from teacher_cache.stages.processes import is_main
from teacher_cache.stages.tasks import TASKS
from teacher_cache.stages.teacher.options import check_options
from teacher_cache.stages.workers.chosen import workers_of
from teacher_cache.stages.workers.interface import Workers
from teacher_cache.stages.workers.ranks import help_main

SIDECAR_SUFFIX = ".json"

logger = logging.getLogger(__name__)


def free_bytes(cache: Path) -> int:
    """What is free on the disk of a cache, whose folder need not exist."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def require_room(cache: Path, num_bytes: float, *, num_shards: int, overwrite: bool) -> None:
    """Refuse a cache that will not fit, and say how large it will be.

    Args:
        cache: its folder, which need not exist.
        num_bytes: of all its shards.
        num_shards: of all its splits; those that are there already need no room.
        overwrite: whether those are removed instead.

    Raises:
        UserError: naming both sizes.
    """
    there = [path for path in cache.glob("*/*/*") if path.is_file()]
    done = 0 if overwrite else sum(path.suffix == SIDECAR_SUFFIX for path in there)
    missing = num_bytes * max(0.0, 1 - done / max(1, num_shards))
    free = free_bytes(cache) + sum(path.stat().st_size for path in there if overwrite)
    if missing > free:
        raise UserError(
            f"the cache will take about {_mb(missing)} MB and the disk of {cache} has "
            f"{_mb(free)} MB free: give an --out on a larger disk, or cache less (fewer "
            "documents, fewer --attention-layers, --attention mean or cls, a smaller --max-length)"
        )
    if missing:
        logger.info("about %s MB to write (%s MB are free)", _mb(missing), _mb(free))


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"


@dataclass(frozen=True, kw_only=True)
class CacheTeacherResult:
    """A cache as this run left it: complete, but for a slice that others are missing beside.

    Attributes:
        cache: its folder.
        manifest: as committed.
        num_shards_run: shards that the teacher ran for in this run.
        num_shards_kept: shards that were committed before.
    """

    cache: Path
    manifest: Manifest
    num_shards_run: int
    num_shards_kept: int


class StageOneObserver:
    """Told what happens while the teacher runs; the base says nothing."""

    def on_plan(
        self, cache: Path, plans: dict[str, ShardPlan], kept: list[Sidecar], todo: list[Shard]
    ) -> None:
        """The shards of this run are known: those that are committed already, and the others."""

    def on_batch(self, num_samples: int, num_tokens: int) -> None:
        """A forward batch is done."""

    def on_shard(self, sidecar: Sidecar) -> None:
        """A shard is durable."""


def run(config: CacheTeacherConfig, observer: StageOneObserver | None = None) -> CacheTeacherResult:
    """Cache what the teacher says of all corpora; resumes from the committed shards.

    Raises:
        UserError: for anything the user can mend: data, teacher, settings, disk.
    """
    check_options(config)
    config = with_heads(config)
    if not is_main():
        outline, num_made = help_main(config)
        return CacheTeacherResult(
            cache=outline.cache,
            manifest=outline.manifest,
            num_shards_run=num_made,
            num_shards_kept=0,
        )
    with workers_of(config) as workers:
        return _written(workers, observer or StageOneObserver(), config.shards.overwrite)


def _written(workers: Workers, observer: StageOneObserver, overwrite: bool) -> CacheTeacherResult:
    """Have the missing shards made, whoever makes them, and finish the cache."""
    outline = workers.outline
    cache, plans = outline.cache, outline.plans
    num_shards = sum(len(plan) for plan in plans.values())
    require_room(cache, outline.num_bytes, num_shards=num_shards, overwrite=overwrite)
    with CacheWriter(
        cache,
        outline.manifest,
        plans,
        overwrite=overwrite,
        needed_files=outline.files,
        share=workers.share,
    ) as writer:
        todo = writer.begin(lambda folder: workers.write_teacher_files(folder, writer.intact_files))
        kept = writer.committed()
        observer.on_plan(cache, plans, kept, todo)
        for sidecar in workers.make(todo, observer.on_batch):
            writer.add(sidecar)
            observer.on_shard(sidecar)

        def about() -> dict[str, Any]:
            findings = workers.found(writer.committed())
            return findings.about() if findings is not None else {}

        if not writer.manifest.complete:
            writer.finish(about)
        return CacheTeacherResult(
            cache=cache,
            manifest=writer.manifest,
            num_shards_run=len(todo),
            num_shards_kept=len(kept),
        )


def with_heads(config: CacheTeacherConfig) -> CacheTeacherConfig:
    """The same with labels that are read as the teacher's head takes them.

    Raises:
        UserError: if its kind is not served.
    """
    of_head = {"heads": TASKS[config.task].teacher.heads(config.forward)}
    update = {
        "labeled": config.labeled.model_copy(update=of_head),
        "fallback": tuple(one.model_copy(update=of_head) for one in config.fallback),
    }
    return config.model_copy(update=update)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a cache that does not exist yet.

    Attributes:
        bytes_per_token: of a language model's fields but those of layers; None where it takes the
            teacher to know, or it is a classifier.
        num_ids: of the teacher's support; None where it was not loaded.
        codec_loss: None where it was not measured.
        num_bytes: of all shards; None where nothing was tokenised, as the next two.
        num_layer_bytes: of that, of attention maps and states of layers.
        maps: what storing attention maps loses (`RowErrors.to_json`); None without any.
        num_tokens: of all corpora.
        num_shards: of all corpora.
    """

    bytes_per_token: float | None
    num_ids: int | None = None
    codec_loss: CodecLoss | None = None
    num_bytes: float | None = None
    num_layer_bytes: float | None = None
    maps: dict[str, Any] | None = None
    num_tokens: float | None = None
    num_shards: int | None = None


def estimate(config: CacheTeacherConfig) -> Estimate:
    """Estimate a cache, views left out, from what is on this machine.

    Raises:
        UserError: for what the run itself would refuse.
    """
    of_teacher = TASKS[config.task].teacher
    corpora = [config.labeled, *([] if config.unlabeled is None else [config.unlabeled])]
    if not Path(config.forward.teacher).is_dir() or not all(
        _is_here(one.source) for one in corpora
    ):
        return Estimate(bytes_per_token=of_teacher.assumed_bytes_per_token(config.kept))
    config = with_heads(config)
    task = of_teacher.prepared(config, load_corpora(config))
    num_bytes = num_layer_bytes = num_tokens = 0.0
    num_shards, per_shard = 0, None
    for corpus in task.corpora.values():
        documents = corpus.documents(0, min(NUM_MEASURED_FOR_SIZE, len(corpus)))
        of_one = task.bytes_per_document(documents)
        if of_one is None:
            continue
        per_shard = per_shard or documents_per_shard(
            of_one, shard_mb=config.shards.shard_mb, max_documents=config.shards.shard_documents
        )
        num_bytes += of_one * len(corpus)
        num_layer_bytes += task.layer_bytes_per_document(documents) * len(corpus)
        num_tokens += task.tokens_per_document(documents) * len(corpus)
        num_shards += len(ShardPlan(num_documents=len(corpus), documents_per_shard=per_shard))
    return Estimate(
        bytes_per_token=task.bytes_per_token,
        num_ids=task.num_ids,
        codec_loss=task.codec_loss,
        num_bytes=num_bytes,
        num_layer_bytes=num_layer_bytes,
        maps=task.about().get("attention"),
        num_tokens=num_tokens,
        num_shards=num_shards,
    )


def _is_here(source: str) -> bool:
    if source in (austen.NAME, reviews.NAME):
        return (assets_folder() / source).is_dir()
    return Path(source).expanduser().exists()
