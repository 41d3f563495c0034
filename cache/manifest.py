"""The manifest: what a cache is, whether it is complete, and hashes of all beside the shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from teacher_cache.cache.commit import write_json_atomically
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.cache.schema import FORMAT, FORMAT_VERSION, FieldSpec, Schema, format_version
from teacher_cache.cache.stores.named import DEFAULT_STORE, store_named

MANIFEST_NAME = "manifest.json"
CHECKSUM = "sha256"  # of all else in it
TEACHER_FOLDER = "teacher"


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What one split holds.

    Attributes:
        num_documents: source documents, empty ones included: the shard plan's length.
        num_shards: of the plan.
        num_samples: cached samples; 0 until the cache is complete, as are the next three.
        num_tokens: positions over all samples.
        num_truncated: samples cut at the maximum length.
        num_bytes: of the shards' files.
        settings: what decides this split's values beside the cache's own settings, and is checked
            like them: how views are made. A cache of an older release has none.
        report: what the survey of the corpus counted (empty, duplicate, labels).
    """

    num_documents: int
    num_shards: int
    num_samples: int = 0
    num_tokens: int = 0
    num_truncated: int = 0
    num_bytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written first without an index, replaced at every segment, and last when all is there.

    Attributes:
        settings: all that changes the cached values; `fingerprint` is its hash.
        layout: how documents are cut into shards: `documents_per_shard`, `shard_mb`.
        schema: the fields of a sample.
        store: how a shard's fields lie on disk (`--format`); no value depends on it.
        splits: by name, in the order in which they are computed.
        about: facts a reader wants but that do not change values (class names, preset, paths).
        teacher_files: SHA-256 of each file of the `teacher/` folder.
        index: `path` and `sha256` of each committed index segment.
        complete: every shard of every split is committed and indexed.
        created_at: UTC, ISO 8601.
        completed_at: the same, None while incomplete.
        versions: of the libraries that made it.
        num_slices: while incomplete, how many runs share its shards (`--slice`).
    """

    fingerprint: str
    settings: dict[str, Any]
    layout: dict[str, int]
    schema: Schema
    splits: dict[str, SplitSummary]
    about: dict[str, Any]
    teacher_files: dict[str, str]
    versions: dict[str, str]
    store: str = DEFAULT_STORE
    index: tuple[dict[str, str], ...] = ()
    complete: bool = False
    created_at: str
    completed_at: str | None = None
    num_slices: int = 1

    def completed(self, splits: dict[str, SplitSummary]) -> Manifest:
        """The same cache with its final counts, marked complete now."""
        return replace(self, splits=splits, complete=True, completed_at=utc_now(), num_slices=1)

    @property
    def plans(self) -> dict[str, ShardPlan]:
        """The shard plan of each split, in order."""
        size = self.layout["documents_per_shard"]
        return {
            split: ShardPlan(num_documents=summary.num_documents, documents_per_shard=size)
            for split, summary in self.splits.items()
        }

    @property
    def maker(self) -> str:
        """The command that made the cache, and makes again what is lost."""
        if "converted_from" in self.about:
            return "pipe convert"
        return "pipe import-log-probs" if "log_probs" in self.settings else "pipe cache-teacher"

    def write(self, cache: Path) -> None:
        """Commit it atomically.

        Raises:
            UserError: where the file system refuses.
        """
        version = max(store_named(self.store).format_version, format_version(self.schema))
        value = asdict(self) | {"format": FORMAT, "format_version": version}
        if self.store == DEFAULT_STORE:  # as it was before there were others
            del value["store"]
        if self.num_slices == 1:  # as it is when it is complete
            del value["num_slices"]
        value["schema"] = [spec.to_json() for spec in self.schema]
        write_json_atomically(cache / MANIFEST_NAME, value | {CHECKSUM: fingerprint(value)})


def utc_now() -> str:
    """The time, UTC, ISO 8601, to the microsecond (the newest cache is chosen by it)."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class NotACacheError(UserError):
    """The folder has no manifest, or another program's."""


def read_manifest(cache: Path) -> Manifest:
    """Read a cache's manifest.

    Raises:
        NotACacheError: if there is none, or it is not ours.
        CheckFailed: if it is not what was written, by its own checksum; older releases wrote none.
        UserError: if it is no JSON, or its format is newer than this reader.
    """
    path = cache / MANIFEST_NAME
    if not path.is_file():
        raise NotACacheError(
            f"{cache} is no cache (it has no {MANIFEST_NAME}): give a folder that "
            "`pipe cache-teacher` wrote, or run `pipe cache-teacher --data ...` first"
        )
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or run stage one again with --overwrite"
        ) from error
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise NotACacheError(
            f"{path} is no cache's manifest (its format is not {FORMAT!r}): give a folder that "
            "`pipe cache-teacher` wrote, or another --out"
        )
    version = value.pop("format_version", None)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r}, this release reads {FORMAT} up to version "
            f"{FORMAT_VERSION}: upgrade teacher-cache, or make the cache again"
        )
    _check(path, value | {"format": FORMAT, "format_version": version})
    value.pop(CHECKSUM, None)
    try:
        value["schema"] = tuple(FieldSpec.from_json(spec) for spec in value["schema"])
        value["splits"] = {name: SplitSummary(**split) for name, split in value["splits"].items()}
        value["index"] = tuple(value["index"])
        return Manifest(**value)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} lacks or adds fields ({error}): restore it, or run stage one again with "
            "--overwrite"
        ) from error


def _check(path: Path, value: dict[str, Any]) -> None:
    recorded = value.pop(CHECKSUM, None)
    if recorded is not None and recorded != fingerprint(value):
        raise CheckFailed(
            f"{path} differs from its own checksum: restore it, or run stage one again with "
            "--overwrite"
        )


def read_teacher_file(cache: Path, manifest: Manifest, name: str) -> bytes:
    """A file of the `teacher` folder that the manifest lists.

    Raises:
        CheckFailed: if it is damaged or missing.
    """
    path = cache / TEACHER_FOLDER / name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest.teacher_files[name]:
        raise CheckFailed(
            f"{path} is missing or differs from its SHA-256: run the same `pipe cache-teacher` "
            "again, it writes the file anew and computes no shard again"
        )
    return data
