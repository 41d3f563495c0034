"""From the name of a source to its table: packaged reviews, a file, a folder or a hub data set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data import reviews
from teacher_cache.stages.data.class_folders import find_class_folders, read_class_folders
from teacher_cache.stages.data.errors import SourceUnavailable
from teacher_cache.stages.data.hub import read_hub
from teacher_cache.stages.data.local_files import (
    content_hash,
    file_kind,
    find_split_files,
    known_extensions,
    read_files,
    split_name,
)
from teacher_cache.stages.data.splits import choose_split

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
    """The splits of packaged reviews or of a folder; None where only reading would tell."""
    if source == reviews.NAME:
        return tuple(reviews.SPLITS)
    path = Path(source).expanduser()
    if path.is_dir():
        return tuple(find_split_files(path) or find_class_folders(path))
    return None


def open_source(source: str, split: str | None) -> Source:
    """Find and read one split of a source.

    Args:
        source: `reviews`, a file, a folder or a hub id, tried in this order.
        split: its name, None for `train` or the only one.

    Raises:
        SourceUnavailable: if there is no such source, or nothing in it.
        UserError: if it has no such split, or cannot be read.
    """
    if source == reviews.NAME:
        return _open_reviews(split)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path, split)
        if path.is_file():
            return _open_file(path, split)
    except OSError as error:
        raise UserError(
            f"{source!r} cannot be read ({error.strerror or error}): check its permissions"
        ) from error
    if not _HUB_ID.fullmatch(source) or file_kind(path) is not None:
        raise SourceUnavailable(
            f"there is no file or folder {source!r}: check the path, or give a data set of the hub"
        )
    table, chosen, revision = read_hub(source, split)
    identity = {"kind": "hub", "name": source, "revision": revision, "split": chosen}
    return Source(table, chosen, f"{source}@{revision}", identity)


def _open_reviews(split: str | None) -> Source:
    chosen = choose_split(reviews.SPLITS, split, "the reviews")
    table, revision = reviews.read_reviews(chosen)
    identity = {"kind": "packaged", "name": reviews.NAME, "revision": revision, "split": chosen}
    return Source(table, chosen, f"{reviews.NAME}@{revision}", identity)


def _open_file(path: Path, split: str | None) -> Source:
    if file_kind(path) is None:
        raise UserError(
            f"{path.name} has an unknown extension, expected one of {known_extensions()}: convert "
            f"or rename the file"
        )
    own_split = split_name(path)
    chosen = choose_split([own_split], split, path.name)
    digest = content_hash([path])
    return _local("file", read_files([path], digest), chosen, digest)


def _open_folder(path: Path, split: str | None) -> Source:
    if split_files := find_split_files(path):
        chosen = choose_split(list(split_files), split, path.name)
        files = split_files[chosen]
        digest = content_hash(files)
        return _local("folder", read_files(files, digest), chosen, digest)
    if class_folders := find_class_folders(path):
        chosen = choose_split(list(class_folders), split, path.name)
        table, digest = read_class_folders(class_folders[chosen])
        return _local("folder", table, chosen, digest)
    raise SourceUnavailable(
        f"the folder {path.name!r} holds no documents, expected train/neg/*.txt (or the like), or "
        f"files such as train.csv of {known_extensions()}: give another folder, or one file"
    )


def _local(kind: str, table: datasets.Dataset, split: str, digest: str) -> Source:
    identity = {"kind": kind, "content_sha256": digest, "split": split}
    return Source(table, split, f"sha256:{digest}", identity)
