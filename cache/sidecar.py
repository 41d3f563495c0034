"""The sidecar beside each shard: what it holds, its checksums, and how it was computed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_cache.cache.commit import canonical_json
from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.stores.interface import BatchRange, Stored, StoredFile

SHARDS_PER_FOLDER = 1000


def shard_path(split: str, shard_idx: int, suffix: str) -> str:
    """Path of a shard inside the cache: sub-folders of 1,000 shards."""
    return f"{split}/{shard_idx // SHARDS_PER_FOLDER:03d}/{shard_idx:06d}{suffix}"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A committed shard. It exists only once the shard's bytes are durable.

    Attributes:
        split: the corpus, `labeled` or `unlabeled`, or views of one (`splits.py`).
        shard_idx: its number in the split.
        path: of the shard, relative to the cache.
        documents: first and one-past-last source document, in corpus order.
        num_bytes: of the shard's file, or of all files of its folder.
        num_samples: samples in it (empty documents have none).
        num_tokens: positions, over all samples.
        num_truncated: samples that were cut at the maximum length.
        first_id: hex id of its first sample, empty without samples.
        last_id: hex id of its last sample.
        sha256: of the whole file, or of the list of the folder's files.
        batches: byte range and CRC32C of each record batch of a file.
        fingerprint: of the settings that made it.
        environment: dtype, device, threads, batch budget, versions, halvings: what bits depend on.
        files: of a folder, each with its size and checksums; only there in the sidecar's JSON.
    """

    split: str
    shard_idx: int
    path: str
    documents: tuple[int, int]
    num_bytes: int
    num_samples: int
    num_tokens: int
    num_truncated: int
    first_id: str
    last_id: str
    sha256: str
    batches: tuple[BatchRange, ...]
    fingerprint: str
    environment: dict[str, Any]
    files: tuple[StoredFile, ...] = ()

    def to_json(self) -> str:
        """Canonical JSON: equal shards have equal sidecars."""
        value = asdict(self)
        if not self.files:  # as it was before there were folders
            del value["files"]
        return canonical_json(value)

    @classmethod
    def from_json(cls, text: str) -> Sidecar:
        """Read back what `to_json` wrote.

        Raises:
            ValueError: if the text is no sidecar.
        """
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
        if value.keys() | {"files"} != cls.__dataclass_fields__.keys():
            raise ValueError("fields are missing or unknown")
        value["documents"] = tuple(value["documents"])
        value["batches"] = tuple(BatchRange(**batch) for batch in value["batches"])
        value["files"] = tuple(StoredFile(**file) for file in value.get("files", ()))
        return cls(**value)

    @property
    def stored(self) -> Stored:
        """The shard's bytes."""
        return Stored(
            num_bytes=self.num_bytes, sha256=self.sha256, batches=self.batches, files=self.files
        )

    def verify(self, cache: Path) -> None:
        """Check the shard's bytes against sizes and SHA-256.

        Raises:
            BadShardError: naming the file and what differs.
        """
        self.stored.verify(cache / self.path)


def sidecar_path(cache: Path, split: str, shard_idx: int) -> Path:
    """Where the shard's sidecar lies."""
    return cache / shard_path(split, shard_idx, ".json")


def read_sidecar(cache: Path, split: str, shard_idx: int) -> Sidecar | None:
    """The shard's sidecar, or None where the shard was not committed.

    Raises:
        BadShardError: if the sidecar cannot be read back.
    """
    path = sidecar_path(cache, split, shard_idx)
    if not path.exists():
        return None
    try:
        return Sidecar.from_json(path.read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise BadShardError(
            f"{path} is no readable sidecar ({error}): run stage one again, it rebuilds this shard"
        ) from error
