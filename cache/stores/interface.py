"""What every store gives: shards written whole, read as fields, and checked file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from teacher_cache.cache.commit import canonical_json
from teacher_cache.cache.errors import BadShardError
from teacher_cache.cache.fingerprint import file_sha256
from teacher_cache.cache.schema import Fields, Schema

REMEDY = "run stage one again, it rebuilds just this shard"


@dataclass(frozen=True, kw_only=True)
class BatchRange:
    """Where one record batch lies in a shard's only file, and the CRC32C of those bytes."""

    offset: int
    num_bytes: int
    num_samples: int
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a shard that is a folder: its path in there, its size and both checksums."""

    path: str
    num_bytes: int
    sha256: str
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The bytes of a shard, as its sidecar records them.

    Attributes:
        num_bytes: of the shard's file, or of all files of its folder.
        sha256: of the file, or of the list of the folder's files (`listing_sha256`).
        batches: of a file: byte range and CRC32C of each record batch.
        files: of a folder: every file in it, by path.
    """

    num_bytes: int
    sha256: str
    batches: tuple[BatchRange, ...] = ()
    files: tuple[StoredFile, ...] = ()

    def verify(self, path: Path) -> None:
        """Check every byte against sizes and SHA-256.

        Args:
            path: of the shard.

        Raises:
            BadShardError: naming the first file that is missing or differs.
        """
        if not self.files:
            require_size(path, self.num_bytes)
            _require_sha256(path, self.sha256)
            return
        if listing_sha256(self.files) != self.sha256:
            raise BadShardError(f"{path}: its sidecar's list of files is damaged: {REMEDY}")
        for file in self.files:
            require_size(path / file.path, file.num_bytes)
            _require_sha256(path / file.path, file.sha256)


class Shard(Protocol):
    """An open shard; bytes are checked against their CRC32C before they are given out."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def sample(self, sample_idx: int) -> dict[str, np.ndarray]:
        """One sample's fields, as views where the store can give them.

        Raises:
            BadShardError: if bytes are missing or differ from their checksum.
        """
        ...

    def lengths(self) -> np.ndarray:
        """Positions of each sample, [N] int64, without reading the other fields."""
        ...

    def batches(self) -> Iterator[Fields]:
        """All fields, some samples at a time, in order.

        Raises:
            BadShardError: if bytes are missing or differ from their checksum.
        """
        ...


class Store(Protocol):
    """How the fields of a shard lie on disk.

    Attributes:
        suffix: of a shard's path.
        format_version: of the manifest, the oldest that knows this store.
        libraries: whose versions the manifest of a cache of this store says besides.
    """

    suffix: str
    format_version: int
    libraries: tuple[str, ...]

    def write(self, path: Path, schema: Schema, fields: Fields) -> Stored:
        """Commit a shard: when this returns it is whole and durable, and before that not there.

        Raises:
            UserError: if the fields do not fit the schema or the file system refuses.
        """
        ...

    def open(self, path: Path, schema: Schema, stored: Stored, *, num_samples: int) -> Shard:
        """Open a shard that was committed.

        Raises:
            BadShardError: if a file is missing or of another size.
        """
        ...


def listing_sha256(files: tuple[StoredFile, ...]) -> str:
    """SHA-256 (hex) of paths and SHA-256s of a folder's files."""
    listing = [[file.path, file.sha256] for file in files]
    return hashlib.sha256(canonical_json(listing).encode()).hexdigest()


def require_size(path: Path, num_bytes: int) -> None:
    """Refuse a file that is missing or of another size.

    Raises:
        BadShardError: naming it and both sizes.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != num_bytes:
        raise BadShardError(
            f"{path} has {'no' if found is None else found} bytes, its sidecar says "
            f"{num_bytes}: {REMEDY}"
        )


def _require_sha256(path: Path, sha256: str) -> None:
    if file_sha256(path) != sha256:
        raise BadShardError(f"{path} differs from its SHA-256: {REMEDY}")
