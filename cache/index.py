"""Index segments: the sidecars of up to 1,000 shards in one Arrow file, replaced whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.fingerprint import file_sha256
from teacher_cache.cache.sidecar import Sidecar

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
