"""The sidecar beside each shard: what it holds, its checksums, and how it was computed.

Index segments hold the sidecars of up to 1,000 shards in one Arrow file each, replaced whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from teacher_cache.cache.commit import canonical_json, write_bytes_atomically
from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.fingerprint import file_sha256
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


INDEX_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("sidecar", pa.string(), nullable=False),
    ]
)


def segment_path(split: str, segment_idx: int) -> str:
    """Path of an index segment inside the cache; segment j covers the shards of sub-folder j."""
    return f"index/{split}-{segment_idx:06d}.arrow"


def write_segment(
    cache: Path, split: str, segment_idx: int, sidecars: list[Sidecar]
) -> dict[str, str]:
    """Commit one segment atomically, a row a shard; return its entry for the manifest.

    Raises:
        UserError: where the file system refuses.
    """
    table = pa.table(
        {
            "path": [sidecar.path for sidecar in sidecars],
            "num_samples": [sidecar.num_samples for sidecar in sidecars],
            "num_tokens": [sidecar.num_tokens for sidecar in sidecars],
            "num_bytes": [sidecar.num_bytes for sidecar in sidecars],
            "sidecar": [sidecar.to_json() for sidecar in sidecars],
        },
        schema=INDEX_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    path = segment_path(split, segment_idx)
    write_bytes_atomically(cache / path, data)
    return {"path": path, "sha256": hashlib.sha256(data).hexdigest()}


def read_segment(cache: Path, entry: dict[str, str]) -> list[Sidecar]:
    """The sidecars of one segment, checked against the manifest's hash.

    Raises:
        BadShardError: if the segment is missing or differs from its hash.
    """
    path = cache / entry["path"]
    if not path.is_file() or file_sha256(path) != entry["sha256"]:
        raise BadShardError(
            f"{path} is missing or differs from its SHA-256 in the manifest: run stage one "
            "again, it rebuilds the index from the sidecars"
        )
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all().column("sidecar").to_pylist()
    return [Sidecar.from_json(row) for row in rows]
