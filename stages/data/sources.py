"""From the name of a source to its table: packaged texts, a file, a folder or a hub data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.hub import Beginning, read_hub
from teacher_cache.stages.data.local_files import (
    TxtUnit,
    content_hash,
    file_kind,
    find_class_folders,
    find_split_files,
    known_extensions,
    read_class_folders,
    read_files,
    split_name,
)
from teacher_cache.stages.data.opening import SourceUnavailable, choose_split
from teacher_cache.stages.data.packaged import austen, reviews


class _Packaged(NamedTuple):
    called: str
    splits: Sequence[str]
    read: Callable[[str], tuple[datasets.Dataset, str]]


_PACKAGED = {
    reviews.NAME: _Packaged("the reviews", reviews.SPLITS, reviews.read_reviews),
    austen.NAME: _Packaged("the novels", tuple(austen.SPLITS), austen.read_austen),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One split of a source.

    Attributes:
        table: its documents in their own order.
        split: its name.
        label: what `Document.source` says: a name with its revision, or a content hash.
        identity: the same in parts, for the fingerprint; never a path.
    """

    table: datasets.Dataset
    split: str
    label: str
    identity: dict[str, str]


def offered_splits(source: str) -> tuple[str, ...] | None:
    """The splits of packaged texts or of a folder; None where only reading would tell."""
    if source in _PACKAGED:
        return tuple(_PACKAGED[source].splits)
    path = Path(source).expanduser()
    if path.is_dir():
        return tuple(find_split_files(path) or find_class_folders(path))
    return None


def open_source(
    source: str,
    split: str | None,
    *,
    txt_unit: TxtUnit = "line",
    beginning: Beginning | None = None,
) -> Source:
    """Find and read one split of a source.

    Args:
        source: `reviews`, `austen`, a file, a folder or a hub id (with its subset where it has
            several, `id:subset`), tried in this order.
        split: its name, None for `train` or the only one.
        txt_unit: what of a .txt file is a document.
        beginning: stream only this part of a hub data set.

    Raises:
        SourceUnavailable: if there is no such source, or nothing in it.
        UserError: if it has no such split, cannot be read, or has no .txt files for `txt_unit`.
    """
    found = _open(source, split, txt_unit, beginning)
    if beginning is not None and found.identity["kind"] != "hub":
        raise UserError(f"{source!r} is here, so nothing of it has to be streamed: read it whole")
    if txt_unit != "line" and "txt_unit" not in found.identity:
        raise UserError(
            f"--txt-unit {txt_unit} is for .txt files, and {source!r} is read from none: leave it "
            "out, or give text files"
        )
    return found


def _open(source: str, split: str | None, txt_unit: TxtUnit, beginning: Beginning | None) -> Source:
    if source in _PACKAGED:
        return _open_packaged(source, split)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path, split, txt_unit)
        if path.is_file():
            return _open_file(path, split, txt_unit)
    except OSError as error:
        raise UserError(
            f"{source!r} cannot be read ({error.strerror or error}): check its permissions"
        ) from error
    if not _HUB_ID.fullmatch(source) or file_kind(path) is not None:
        raise SourceUnavailable(
            f"there is no file or folder {source!r}: check the path, or give a data set of the hub"
        )
    table, chosen, revision = read_hub(source, split, beginning)
    identity = {"kind": "hub", "name": source, "revision": revision, "split": chosen}
    return Source(table, chosen, f"{source}@{revision}", identity)


def _open_packaged(name: str, split: str | None) -> Source:
    packaged = _PACKAGED[name]
    chosen = choose_split(packaged.splits, split, packaged.called)
    table, revision = packaged.read(chosen)
    identity = {"kind": "packaged", "name": name, "revision": revision, "split": chosen}
    return Source(table, chosen, f"{name}@{revision}", identity)


def _open_file(path: Path, split: str | None, txt_unit: TxtUnit) -> Source:
    if file_kind(path) is None:
        raise UserError(
            f"{path.name} has an unknown extension, expected one of {known_extensions()}: convert "
            f"or rename the file"
        )
    chosen = choose_split([split_name(path)], split, path.name)
    return _local_files("file", [path], chosen, txt_unit)


def _open_folder(path: Path, split: str | None, txt_unit: TxtUnit) -> Source:
    if split_files := find_split_files(path):
        chosen = choose_split(list(split_files), split, path.name)
        return _local_files("folder", split_files[chosen], chosen, txt_unit)
    if class_folders := find_class_folders(path):
        chosen = choose_split(list(class_folders), split, path.name)
        table, digest = read_class_folders(class_folders[chosen])
        return Source(table, chosen, f"sha256:{digest}", _identity("folder", digest, chosen))
    raise SourceUnavailable(
        f"the folder {path.name!r} holds no documents, expected train/neg/*.txt (or the like), or "
        f"files such as train.csv of {known_extensions()}: give another folder, or one file"
    )


def _local_files(kind: str, files: Sequence[Path], split: str, txt_unit: TxtUnit) -> Source:
    digest = content_hash(files)
    identity = _identity(kind, digest, split)
    if txt_unit != "line" and file_kind(files[0]) == ".txt":
        # Absent where it is the default, so that caches from before it keep their fingerprints.
        identity["txt_unit"] = txt_unit
    return Source(read_files(files, digest, txt_unit=txt_unit), split, f"sha256:{digest}", identity)


def _identity(kind: str, digest: str, split: str) -> dict[str, str]:
    return {"kind": kind, "content_sha256": digest, "split": split}
