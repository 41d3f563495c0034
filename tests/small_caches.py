"""Small caches without a teacher: values are a function of the document alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.cache import committed, sidecar, writer
from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import CHECKSUM, MANIFEST_NAME, Manifest, SplitSummary
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.cache.schema import ABSENT_LABEL, Fields, Ragged, classification_schema
from teacher_cache.cache.stores.named import DEFAULT_STORE
from teacher_cache.cache.writer import CacheWriter

NUM_CLASSES = 3
SCHEMA = classification_schema(NUM_CLASSES)
SETTINGS = {"max_length": 8, "teacher": {"dtype": "float32", "weights_sha256": "0a"}}
SHARD_SIZE = 4

Shards = list[tuple[str, int]]

default_store = {"name": DEFAULT_STORE}
"""What caches here are written in; a module whose tests run in every store sets it."""
ONE_FILE = {"arrow": ".arrow", "zarr": ".zarr/class_logits/c/0/0"}


def shard_file(cache: Path, split: str, shard_idx: int, folder: int = 0) -> Path:
    """A shard's file, or the file with the logits of a shard that is a folder."""
    return cache / f"{split}/{folder:03d}/{shard_idx:06d}{ONE_FILE[default_store['name']]}"


def is_empty(document: int) -> bool:
    """Whether a document has no text: every seventh, and all of the sixth shard."""
    return document % 7 == 5 or document // SHARD_SIZE == 5


def make_fields(split: str, documents: range) -> Fields:
    """What a teacher would have said of all documents but the empty ones."""
    samples = [document for document in documents if not is_empty(document)]
    rngs = [np.random.default_rng([len(split), document]) for document in samples]
    tokens = [rng.integers(2**32, size=rng.integers(1, 9), dtype=np.uint32) for rng in rngs]
    labels = [
        document % NUM_CLASSES if split == "labeled" else ABSENT_LABEL for document in samples
    ]
    ids = b"".join(rng.bytes(15) + b"\0" for rng in rngs)  # numpy's own strings drop such zeros
    logits = [rng.standard_normal(NUM_CLASSES, np.float32) for rng in rngs]
    return {
        "sample_id": np.frombuffer(ids, "V16"),
        "input_ids": Ragged.from_arrays(tokens, "uint32"),
        "label": np.array(labels, np.int32),
        "class_logits": np.array(logits, np.float32).reshape(-1, NUM_CLASSES),
    }


def make_plans(num_labeled: int, num_unlabeled: int = 0) -> dict[str, ShardPlan]:
    """Shards of four documents; no unlabelled split for 0."""
    sizes = {"labeled": num_labeled, "unlabeled": num_unlabeled}
    return {
        split: ShardPlan(num_documents=size, documents_per_shard=SHARD_SIZE)
        for split, size in sizes.items()
        if size
    }


def make_manifest(
    plans: dict[str, ShardPlan], settings: dict[str, Any] = SETTINGS, store: str | None = None
) -> Manifest:
    """The manifest that a run begins with; in another store than `default_store` where named."""
    return Manifest(
        fingerprint=fingerprint(settings),
        settings=settings,
        layout={"documents_per_shard": SHARD_SIZE, "shard_mb": 64},
        schema=SCHEMA,
        splits={
            split: SplitSummary(
                num_documents=plan.num_documents, num_shards=len(plan), report={"num_empty": 1}
            )
            for split, plan in plans.items()
        },
        about={},
        teacher_files={},
        versions={"numpy": "2"},
        store=store or default_store["name"],
        created_at="2026-01-01T00:00:00.000000+00:00",
    )


def write_teacher_files(folder: Path) -> None:
    """Two files in the place of a tokenizer's."""
    write_json_atomically(folder / "tokenizer.json", {"a": 1})
    write_json_atomically(folder / "config.json", {"num_labels": NUM_CLASSES})


def commit_shard(to: CacheWriter, plans: dict[str, ShardPlan], split: str, shard_idx: int) -> None:
    """Compute a shard and commit it."""
    to.commit(
        split,
        shard_idx,
        make_fields(split, range(*plans[split].documents(shard_idx))),
        num_truncated=1,
        environment={"threads": 1},
    )


def write_cache(
    cache: Path,
    num_labeled: int = 10,
    num_unlabeled: int = 0,
    *,
    settings: dict[str, Any] = SETTINGS,
    overwrite: bool = False,
    store: str | None = None,
    before_shard: Callable[[str, int], None] = lambda split, shard_idx: None,
) -> Shards:
    """Write or go on with a cache; return the shards that were computed."""
    plans = make_plans(num_labeled, num_unlabeled)
    manifest = make_manifest(plans, settings, store)
    with CacheWriter(cache, manifest, plans, overwrite=overwrite) as to:
        todo = to.begin(write_teacher_files)
        for split, shard_idx in todo:
            before_shard(split, shard_idx)
            commit_shard(to, plans, split, shard_idx)
        if not to.manifest.complete:
            to.finish()
    return todo


def contents(cache: Path) -> dict[str, bytes]:
    """Every file's bytes by its path in the cache; the manifest's without its timestamps."""
    files = {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file()
    }
    manifest = json.loads(files.pop(MANIFEST_NAME))
    manifest["created_at"] = manifest["completed_at"] = manifest[CHECKSUM] = None
    return files | {MANIFEST_NAME: json.dumps(manifest).encode()}


def without_token(name: str) -> str:
    """A temporary name, without what makes it unlike all others."""
    return re.sub(r"\.[0-9a-f]{8}(\.tmp)", r"\1", name)


def set_shards_per_folder(set_constant: Callable[[Any, str, Any], Any], number: int) -> None:
    """Make segments small; every module that reads the constant must agree.

    Args:
        set_constant: `setattr`, or monkeypatch's.
        number: of shards in a sub-folder and an index segment.
    """
    for module in (committed, sidecar, writer):
        set_constant(module, "SHARDS_PER_FOLDER", number)


def read_unchecked(cache: Path) -> dict[str, Any]:
    """A manifest's JSON without its checksum, as an older release wrote it: to be changed."""
    value = json.loads((cache / MANIFEST_NAME).read_text())
    value.pop(CHECKSUM, None)
    return value
