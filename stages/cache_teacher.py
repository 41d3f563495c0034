"""Stage one: run the teacher once over the corpora and commit what it says, shard by shard.

What a cache will take can be estimated before: bytes, shards, what codec and maps lose. For that
nothing is fetched: what needs data or a teacher that is not on this machine is left open.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import (
    MANIFEST_NAME,
    Manifest,
    SplitSummary,
    read_manifest,
    utc_now,
)
from teacher_cache.cache.plan import ShardPlan, documents_per_shard
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.cache.stores.named import DEFAULT_STORE, store_named
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.codecs.measure import CodecLoss
from teacher_cache.stages.config import Part
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, load_with_fallback
from teacher_cache.stages.data.packaged import austen, reviews
from teacher_cache.stages.data.packaged.packages import assets_folder
from teacher_cache.stages.data.survey import survey_splits
from teacher_cache.stages.data.tokenization import Reading, tokenize
from teacher_cache.stages.data.views import Views, split_settings, with_views
from teacher_cache.stages.join.teacher_folder import choose_probe, write_tokenization
from teacher_cache.stages.models.pretrained import described_config
from teacher_cache.stages.tasks import TASKS
from teacher_cache.stages.teacher.config import CaptureConfig, ShardConfig
from teacher_cache.stages.teacher.options import check_options
from teacher_cache.stages.teacher.task import Task

NUM_MEASURED_FOR_SIZE = 64
SIDECAR_SUFFIX = ".json"
AnyTask = Task[Any, Any]


def estimated_bytes(task: AnyTask, splits: Mapping[str, Corpus | Views]) -> float:
    """Of all shards, by the first documents of each split."""
    total = 0.0
    for documents in splits.values():
        first = documents.documents(0, min(NUM_MEASURED_FOR_SIZE, len(documents)))
        of_one = task.bytes_per_document(first) if first else None
        total += (of_one or 0.0) * len(documents)
    return total


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


VERSIONED = ("teacher-cache", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")

logger = logging.getLogger(__name__)


class CacheTeacherConfig(CaptureConfig):
    """Everything stage one needs, resolved: no preset, no default teacher."""

    shards: Part[ShardConfig]

    name: str = Field(description="Short name of the data; begins the cache's folder name.")
    labeled: CorpusConfig = Field(
        description="The labelled corpus; a language model's main one, in which every token is "
        "the label of those before it; or text without labels alone."
    )
    unlabeled: CorpusConfig | None = Field(
        default=None, description="The unlabelled corpus, or none."
    )
    unlabeled_is_named: bool = Field(
        default=False,
        description="The user chose the unlabelled corpus; if not, a fallback goes without it.",
    )
    fallback: tuple[CorpusConfig, ...] = Field(
        default=(), description="Labelled corpora to try, in order, if the first cannot be loaded."
    )


@dataclass(frozen=True, kw_only=True)
class CacheTeacherResult:
    """A complete cache.

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

    def on_plan(self, cache: Path, plans: dict[str, ShardPlan], kept: list[Sidecar]) -> None:
        """The shards are known, and which of them are committed already."""

    def on_batch(self, num_samples: int, num_tokens: int) -> None:
        """A forward batch is done."""

    def on_shard(self, sidecar: Sidecar) -> None:
        """A shard is durable."""


def run(config: CacheTeacherConfig, observer: StageOneObserver | None = None) -> CacheTeacherResult:
    """Cache what the teacher says of all corpora; resumes from the committed shards.

    Raises:
        UserError: for anything the user can mend: data, teacher, settings, disk.
    """
    observer = observer or StageOneObserver()
    check_options(config)
    task: AnyTask = TASKS[config.task].teacher.prepared(config, load_corpora(config))
    begun = (one for one in (task, *task.formers) if _is_begun(config, _settings(one)))
    task = next(begun, task)
    settings = _settings(task)
    cache = config.shards.out or _default_folder(config, settings)
    splits = with_views(task.corpora, config.shards.views, _reading(task))
    plans = _plan(config, cache, splits, task)
    require_room(
        cache,
        estimated_bytes(task, splits),
        num_shards=sum(len(plan) for plan in plans.values()),
        overwrite=config.shards.overwrite,
    )
    manifest = _manifest(config, settings, plans, task)
    with CacheWriter(
        cache, manifest, plans, overwrite=config.shards.overwrite, needed_files=task.files
    ) as writer:
        todo = writer.begin(
            lambda folder: _write_teacher_files(folder, task, plans, intact=writer.intact_files)
        )
        kept = writer.committed()
        observer.on_plan(cache, plans, kept)
        findings = task.findings()
        if not writer.manifest.complete:
            for fields in writer.batches("labeled"):
                findings.add(fields)
        for split, shard_idx in todo:
            documents = splits[split].documents(*plans[split].documents(shard_idx))
            captured = task.capture(documents, observer.on_batch)
            sidecar = writer.commit(
                split,
                shard_idx,
                captured.fields,
                num_truncated=captured.num_truncated,
                environment=captured.environment,
            )
            if split == "labeled":
                findings.add(captured.fields)
            observer.on_shard(sidecar)
        if not writer.manifest.complete:
            writer.finish(findings.about())
        return CacheTeacherResult(
            cache=cache,
            manifest=writer.manifest,
            num_shards_run=len(todo),
            num_shards_kept=len(kept),
        )


def _settings(task: AnyTask) -> dict[str, Any]:
    """All that changes the cached values."""
    data = {split: corpus.identity for split, corpus in task.corpora.items()}
    return {**task.settings(), "data": data}


def _is_begun(config: CacheTeacherConfig, settings: dict[str, Any]) -> bool:
    """Whether a cache of just these settings is there, to be gone on with."""
    cache = config.shards.out or _default_folder(config, settings)
    if config.shards.overwrite or not (cache / MANIFEST_NAME).exists():
        return False
    return read_manifest(cache).fingerprint == fingerprint(settings)


def load_corpora(config: CacheTeacherConfig) -> dict[str, Corpus]:
    """The corpora by split, a fallback's where the first cannot be loaded.

    Raises:
        UserError: if there is none, or one cannot be read as asked.
    """
    labeled, used = load_with_fallback(config.labeled, config.fallback)
    corpora = {"labeled": labeled}
    if used != config.labeled and config.unlabeled is not None and not config.unlabeled_is_named:
        logger.warning(
            "the unlabelled text of %s is left out with it: name one with --unlabeled",
            config.labeled.source,
        )
    elif config.unlabeled is not None:
        corpora["unlabeled"], _ = load_with_fallback(config.unlabeled, [])
    return corpora


def versioned(store: str) -> tuple[str, ...]:
    """The libraries whose versions stand in the manifest of a cache in this format."""
    return (*VERSIONED, *store_named(store).libraries)


def _default_folder(config: CacheTeacherConfig, settings: dict[str, Any]) -> Path:
    """By name and fingerprint; the same values in another format have a folder of their own."""
    suffix = "" if config.shards.format == DEFAULT_STORE else f"-{config.shards.format}"
    return Path("caches") / f"{config.name}-{fingerprint(settings)[:8]}{suffix}"


def _plan(
    config: CacheTeacherConfig, cache: Path, splits: Mapping[str, Corpus | Views], task: AnyTask
) -> dict[str, ShardPlan]:
    """Shards of a recorded size; a new cache's size comes from the first documents' tokens."""
    if (cache / MANIFEST_NAME).exists() and not config.shards.overwrite:
        per_shard = read_manifest(cache).layout["documents_per_shard"]
    else:
        documents = splits["labeled"].documents(
            0, min(NUM_MEASURED_FOR_SIZE, len(splits["labeled"]))
        )
        num_bytes = task.bytes_per_document(documents)
        if num_bytes is None:
            raise UserError(
                f"the first {len(documents)} documents of {config.labeled.source} are all empty: "
                "check --text-column"
            )
        per_shard = documents_per_shard(
            num_bytes, shard_mb=config.shards.shard_mb, max_documents=config.shards.shard_documents
        )
    return {
        split: ShardPlan(num_documents=len(documents), documents_per_shard=per_shard)
        for split, documents in splits.items()
    }


def _reading(task: AnyTask) -> Reading:
    return Reading.of(task.teacher.tokenizer, max_length=task.max_length)


def _manifest(
    config: CacheTeacherConfig,
    settings: dict[str, Any],
    plans: dict[str, ShardPlan],
    task: AnyTask,
) -> Manifest:
    corpora = task.corpora
    reports = survey_splits(corpora, config.shards.views, _reading(task))
    for split, report in reports.items():
        logger.info("%s: %s", split, report.describe())
    return Manifest(
        fingerprint=fingerprint(settings),
        settings=settings,
        layout={
            "shard_mb": config.shards.shard_mb,
            "shard_documents": config.shards.shard_documents,
            "documents_per_shard": plans["labeled"].documents_per_shard,
        },
        schema=task.schema,
        splits={
            split: SplitSummary(
                num_documents=plan.num_documents,
                num_shards=len(plan),
                settings=split_settings(split),
                report=reports[split].model_dump(),
            )
            for split, plan in plans.items()
        },
        about={
            "name": config.name,
            # Whole, so that an evaluation finds it from any folder.
            "teacher": str(Path(config.forward.teacher).resolve())
            if Path(config.forward.teacher).is_dir()
            else config.forward.teacher,
            "sources": {split: corpus.config.source for split, corpus in corpora.items()},
            "fell_back_from": config.labeled.source
            if corpora["labeled"].config != config.labeled
            else None,
            "batching": task.teacher.batching.to_json(),
            **task.about(),
        },
        teacher_files={},
        versions={name: version(name) for name in versioned(config.shards.format)},
        store=config.shards.format,
        created_at=utc_now(),
    )


def _write_teacher_files(
    folder: Path, task: AnyTask, plans: dict[str, ShardPlan], *, intact: Collection[str]
) -> None:
    """Tokenizer, id-to-string table, a probe of documents, configuration, the task's own files."""
    tokenizer, max_length = task.teacher.tokenizer, task.max_length
    probe = []
    for split, corpus in task.corpora.items():
        documents = corpus.documents(*plans[split].documents(0))
        samples = tokenize(documents, tokenizer, max_length=max_length)
        by_id = {document.sample_id: document for document in documents}
        kept = [by_id[sample.sample_id] for sample in samples]
        probe.extend(choose_probe(kept, samples, num=32 // len(task.corpora)))
    write_tokenization(folder, tokenizer, max_length=max_length, probe=probe)
    write_json_atomically(folder / "config.json", described_config(task.teacher.model))
    for name, write in task.files.items():
        if name not in intact:
            write(folder)


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
