"""Stage one: run the teacher once over the corpora and commit what it says, shard by shard."""

from __future__ import annotations

import logging
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
from teacher_cache.cache.schema import Schema, classification_schema, fixed_bytes
from teacher_cache.cache.sidecar import Sidecar
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.data.corpus import Corpus, CorpusConfig, load_with_fallback
from teacher_cache.stages.data.survey import survey_splits
from teacher_cache.stages.data.tokenization import tokenize
from teacher_cache.stages.data.views import Views, split_settings, with_views
from teacher_cache.stages.join.record import describe
from teacher_cache.stages.join.teacher_folder import choose_probe, write_tokenization
from teacher_cache.stages.teacher.capture import capture
from teacher_cache.stages.teacher.config import ShardConfig
from teacher_cache.stages.teacher.embedding_table import TABLE, TABLE_FILE, embedding_table
from teacher_cache.stages.teacher.forward import find_pooled_width
from teacher_cache.stages.teacher.load import (
    Teacher,
    described_config,
    identity,
    load_teacher,
)
from teacher_cache.stages.teacher.stored_tables import StoredTable
from teacher_cache.stages.teacher.token_states import STATES, STATES_FILE, token_states

NUM_PROBED_FOR_SIZE = 64
VERSIONED = ("teacher-cache", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")

logger = logging.getLogger(__name__)


class CacheTeacherConfig(ShardConfig):
    """Everything stage one needs, resolved: no preset, no default teacher."""

    name: str = Field(description="Short name of the data; begins the cache's folder name.")
    labeled: CorpusConfig = Field(description="The labelled corpus.")
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
    """Cache the teacher's logits over all corpora; resumes from the committed shards.

    Raises:
        UserError: for anything the user can mend: data, teacher, settings, disk.
    """
    observer = observer or StageOneObserver()
    corpora = _load_corpora(config)
    teacher = load_teacher(config)
    corpora["labeled"] = corpora["labeled"].with_class_names(teacher.id2label)
    _require_two_classes(corpora["labeled"])
    max_length = teacher.max_length(config.max_length)
    pooled_width = find_pooled_width(teacher) if config.hidden == "pooled" else None
    settings = _settings(config, teacher, corpora, max_length)
    cache = config.out or Path("caches") / f"{config.name}-{fingerprint(settings)[:8]}"
    schema = classification_schema(len(teacher.id2label), pooled_width=pooled_width)
    splits = with_views(corpora, config.views, teacher.mask_token)
    plans = _plan(config, cache, splits, teacher, max_length, schema)
    num_ids = max(teacher.tokenizer.get_vocab().values()) + 1
    embeddings = embedding_table(teacher.model, num_ids=num_ids)
    states_shape = None if pooled_width is None else (num_ids, pooled_width)
    manifest = _manifest(
        config, settings, schema, corpora, plans, teacher, embeddings, states_shape
    )
    needed = [] if embeddings is None else [TABLE_FILE]
    needed += [] if states_shape is None else [STATES_FILE]
    with CacheWriter(
        cache, manifest, plans, overwrite=config.overwrite, needed_files=needed
    ) as writer:

        def write_teacher_files(folder: Path) -> None:
            _write_teacher_files(folder, teacher, corpora, plans, max_length, embeddings)
            if states_shape is not None and STATES_FILE not in writer.intact_files:
                states = token_states(
                    teacher,
                    num_ids=states_shape[0],
                    pooled_width=states_shape[1],
                    batch_tokens=config.batch_tokens,
                )
                states.write(folder)

        todo = writer.begin(write_teacher_files)
        kept = writer.committed()
        observer.on_plan(cache, plans, kept)
        for split, shard_idx in todo:
            documents = splits[split].documents(*plans[split].documents(shard_idx))
            samples = tokenize(documents, teacher.tokenizer, max_length=max_length)
            captured = capture(
                teacher,
                samples,
                batch_tokens=config.batch_tokens,
                on_batch=observer.on_batch,
                pooled_width=pooled_width,
            )
            sidecar = writer.commit(
                split,
                shard_idx,
                captured.fields,
                num_truncated=sum(sample.was_truncated for sample in samples),
                environment=captured.environment,
            )
            observer.on_shard(sidecar)
        if not writer.manifest.complete:
            writer.finish()
        return CacheTeacherResult(
            cache=cache,
            manifest=writer.manifest,
            num_shards_run=len(todo),
            num_shards_kept=len(kept),
        )


def _load_corpora(config: CacheTeacherConfig) -> dict[str, Corpus]:
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


def _require_two_classes(corpus: Corpus) -> None:
    present = [name for name, count in (corpus.label_counts() or {}).items() if count]
    if len(present) < 2:
        raise UserError(
            f"all {len(corpus):,} labelled documents of {corpus.config.source} are of the class "
            f"{', '.join(present)}: a classifier needs two, so raise --max-samples"
        )


def _settings(
    config: CacheTeacherConfig, teacher: Teacher, corpora: dict[str, Corpus], max_length: int
) -> dict[str, Any]:
    """All that changes the cached values; limits on the number of documents do not."""
    record = describe(teacher.tokenizer, max_length=max_length)
    return {
        "task": "classification",
        "codec": "class_logits",
        "teacher": identity(teacher, record.files_sha256),
        "data": {split: corpus.identity for split, corpus in corpora.items()},
        "max_length": max_length,
        "truncation_side": record.truncation_side,
        # Absent where it is off, so that caches from before it keep their fingerprints.
        **({} if config.hidden == "none" else {"hidden": config.hidden}),
    }


def _plan(
    config: CacheTeacherConfig,
    cache: Path,
    splits: dict[str, Corpus | Views],
    teacher: Teacher,
    max_length: int,
    schema: Schema,
) -> dict[str, ShardPlan]:
    """Shards of a recorded size; a new cache's size comes from the first documents' tokens."""
    if (cache / MANIFEST_NAME).exists() and not config.overwrite:
        per_shard = read_manifest(cache).layout["documents_per_shard"]
    else:
        documents = splits["labeled"].documents(0, min(NUM_PROBED_FOR_SIZE, len(splits["labeled"])))
        samples = tokenize(documents, teacher.tokenizer, max_length=max_length)
        if not samples:
            raise UserError(
                f"the first {len(documents)} documents of {config.labeled.source} are all empty: "
                "check --text-column"
            )
        tokens = sum(len(sample.input_ids) for sample in samples) / len(samples)
        ids_bytes = 4 * tokens + 4  # the ids and where they end
        per_shard = documents_per_shard(
            fixed_bytes(schema) + ids_bytes,
            shard_mb=config.shard_mb,
            max_documents=config.shard_documents,
        )
    return {
        split: ShardPlan(num_documents=len(documents), documents_per_shard=per_shard)
        for split, documents in splits.items()
    }


def _manifest(
    config: CacheTeacherConfig,
    settings: dict[str, Any],
    schema: Schema,
    corpora: dict[str, Corpus],
    plans: dict[str, ShardPlan],
    teacher: Teacher,
    embeddings: StoredTable | None,
    states_shape: tuple[int, int] | None,
) -> Manifest:
    reports = survey_splits(corpora, config.views, teacher.mask_token)
    for split, report in reports.items():
        logger.info("%s: %s", split, report.describe())
    return Manifest(
        fingerprint=fingerprint(settings),
        settings=settings,
        layout={
            "shard_mb": config.shard_mb,
            "shard_documents": config.shard_documents,
            "documents_per_shard": plans["labeled"].documents_per_shard,
        },
        schema=schema,
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
            "teacher": str(Path(config.teacher).resolve())
            if Path(config.teacher).is_dir()
            else config.teacher,
            "id2label": {str(i): name for i, name in enumerate(corpora["labeled"].class_names())},
            "sources": {split: corpus.config.source for split, corpus in corpora.items()},
            "fell_back_from": config.labeled.source
            if corpora["labeled"].config != config.labeled
            else None,
            TABLE: None if embeddings is None else embeddings.facts(),
            # Only where they are cached, so that other manifests stay as they were.
            **(
                {}
                if states_shape is None
                else {STATES: dict(zip(("num_rows", "width"), states_shape, strict=True))}
            ),
        },
        teacher_files={},
        versions={name: version(name) for name in VERSIONED},
        created_at=utc_now(),
    )


def _write_teacher_files(
    folder: Path,
    teacher: Teacher,
    corpora: dict[str, Corpus],
    plans: dict[str, ShardPlan],
    max_length: int,
    embeddings: StoredTable | None,
) -> None:
    """Tokenizer, id-to-string table, a probe of documents, configuration, embeddings."""
    probe = []
    for split, corpus in corpora.items():
        documents = corpus.documents(*plans[split].documents(0))
        samples = tokenize(documents, teacher.tokenizer, max_length=max_length)
        by_id = {document.sample_id: document for document in documents}
        kept = [by_id[sample.sample_id] for sample in samples]
        probe.extend(choose_probe(kept, samples, num=32 // len(corpora)))
    write_tokenization(folder, teacher.tokenizer, max_length=max_length, probe=probe)
    write_json_atomically(folder / "config.json", described_config(teacher.model))
    if embeddings is not None:
        embeddings.write(folder)
