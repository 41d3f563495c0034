"""What a run of stage one is to make: teacher and corpora prepared, and shards one by one.

It knows nothing of who else makes shards of the same cache.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field

from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import differences, fingerprint
from teacher_cache.cache.manifest import (
    MANIFEST_NAME,
    Manifest,
    SplitSummary,
    read_manifest,
    utc_now,
)
from teacher_cache.cache.plan import LABELED, Shard, ShardPlan, documents_per_shard
from teacher_cache.cache.shards import Shards
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.cache.stores.named import DEFAULT_STORE, store_named
from teacher_cache.stages.config import Part
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, load_with_fallback
from teacher_cache.stages.data.survey import survey_splits
from teacher_cache.stages.data.tokenization import Reading, tokenize
from teacher_cache.stages.data.views import Views, split_settings, with_views
from teacher_cache.stages.join.teacher_folder import choose_probe, write_tokenization
from teacher_cache.stages.models.inference import OnBatch
from teacher_cache.stages.models.pretrained import described_config
from teacher_cache.stages.tasks import TASKS
from teacher_cache.stages.teacher.config import CaptureConfig, ShardConfig
from teacher_cache.stages.teacher.task import Findings, Task, recorded_environment
from teacher_cache.stages.workers.config import WorkersConfig

NUM_MEASURED_FOR_SIZE = 64
AnyTask = Task[Any, Any]
VERSIONED = ("teacher-cache", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")

logger = logging.getLogger(__name__)


class CacheTeacherConfig(CaptureConfig):
    """Everything stage one needs, resolved: no preset, no default teacher."""

    shards: Part[ShardConfig]
    workers: Part[WorkersConfig]

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
class Outline:
    """What a cache is to be: all that its writer needs of a job, small enough to be sent.

    Attributes:
        cache: its folder.
        manifest: incomplete, without index.
        plans: the shard plan of each split.
        files: of the `teacher` folder that only this kind of teacher has.
        num_bytes: of all shards, estimated.
        environment: what the bits of a shard depend on besides the settings.
    """

    cache: Path
    manifest: Manifest
    plans: dict[str, ShardPlan]
    files: tuple[str, ...]
    num_bytes: float
    environment: dict[str, Any]

    @property
    def shards(self) -> Shards:
        """Of the cache, once it is begun."""
        return Shards(cache=self.cache, manifest=self.manifest, plans=self.plans)


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """A teacher with its corpora, ready to make shards of a cache.

    Attributes:
        task: the teacher and what is kept of it.
        splits: documents by split, views among them.
        outline: of the cache.
    """

    task: AnyTask
    splits: Mapping[str, Corpus | Views]
    outline: Outline

    @classmethod
    def prepared(cls, config: CacheTeacherConfig) -> Self:
        """Load corpora and teacher, and settle what the cache is to be.

        Raises:
            UserError: for anything the user can mend in data, teacher or settings.
        """
        if config.workers.threads is not None:
            torch.set_num_threads(config.workers.threads)
        task: AnyTask = TASKS[config.task].teacher.prepared(config, load_corpora(config))
        begun = (one for one in (task, *task.formers) if _is_begun(config, _settings(one)))
        task = next(begun, task)
        settings = _settings(task)
        cache = config.shards.out or _default_folder(config, settings)
        splits = with_views(task.corpora, config.shards.views, _reading(task))
        plans = _plan(config, cache, splits, task)
        outline = Outline(
            cache=cache,
            manifest=_manifest(config, settings, plans, task),
            plans=plans,
            files=tuple(task.files),
            num_bytes=estimated_bytes(task, splits),
            environment=recorded_environment(
                task.teacher, batch_tokens=task.batch_tokens, num_halvings=0
            ),
        )
        return cls(task=task, splits=splits, outline=outline)

    def require_same(self, outline: Outline) -> None:
        """Refuse to work on a cache that another worker began as something else.

        Raises:
            UserError: naming each difference and both values.
        """
        changed = [
            f"{field} is {old!r} there and {new!r} here"
            for field, old, new in differences(_compared(outline), _compared(self.outline))
        ]
        if changed:
            raise UserError(
                f"{outline.cache} was begun by a worker that would make other bytes than this one: "
                f"{'; '.join(changed)}. Let workers of one kind share a cache"
            )

    def write_teacher_files(self, folder: Path, intact: Collection[str]) -> None:
        """Fill the cache's `teacher` folder, atomically and deterministically.

        Args:
            folder: to be filled.
            intact: of the teacher's own files, those that need not be written.
        """
        _write_teacher_files(folder, self.task, self.outline.plans, intact=intact)

    def make(self, shard: Shard, on_batch: OnBatch) -> Sidecar:
        """Run the teacher over a shard's documents and make it durable.

        One that is there is left as it is, its teacher not asked: a worker that was given up for
        dead may have made it.

        Raises:
            UserError: if what the teacher says cannot be kept, or the file system refuses.
        """
        shards = self.outline.shards
        found = shards.committed(shard)
        if found is not None:
            return found
        split, shard_idx = shard
        start, stop = self.outline.plans[split].documents(shard_idx)
        captured = self.task.capture(self.splits[split].documents(start, stop), on_batch)
        return shards.committed(shard) or shards.commit(
            split,
            shard_idx,
            captured.fields,
            num_truncated=captured.num_truncated,
            environment=captured.environment,
        )

    def found(self, sidecars: Iterable[Sidecar]) -> Findings | None:
        """What the committed shards of the main corpus tell together; None where nothing is asked.

        Raises:
            BadShardError: if the bytes of one are missing or differ from their checksum.
        """
        findings = self.task.findings()
        if findings is not None:
            for sidecar in sidecars:
                if sidecar.split == LABELED:
                    for fields in self.outline.shards.batches(sidecar):
                        findings.add(fields)
        return findings


def _compared(outline: Outline) -> dict[str, Any]:
    """What workers that share a cache must agree on, for its bytes to be those of one process."""
    manifest = outline.manifest
    return {
        "cache": str(outline.cache.absolute()),
        "settings": manifest.settings,
        "layout": manifest.layout,
        "documents": {name: split.num_documents for name, split in manifest.splits.items()},
        "versions": manifest.versions,
        "environment": outline.environment,
    }


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


def estimated_bytes(task: AnyTask, splits: Mapping[str, Corpus | Views]) -> float:
    """Of all shards, by the first documents of each split."""
    total = 0.0
    for documents in splits.values():
        first = documents.documents(0, min(NUM_MEASURED_FOR_SIZE, len(documents)))
        of_one = task.bytes_per_document(first) if first else None
        total += (of_one or 0.0) * len(documents)
    return total
