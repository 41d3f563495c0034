"""Folders of text files, one document a file, one sub-folder a class.

This is aclImdb's layout, `{train,test}/{neg,pos}/*.txt` with `train/unsup/*.txt`, and the simpler
`{neg,pos}/*.txt`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from teacher_cache.cache.errors import UserError

# Class folders that hold documents nobody labelled; they make up a split of their own.
_UNLABELED_FOLDERS = ("unsup", "unsupervised", "unlabeled", "unlabelled")
UNSUPERVISED_SPLIT = "unsupervised"


@dataclass(frozen=True)
class ClassFolder:
    """One folder of text files; `label` is its name, or None where nobody labelled them."""

    path: Path
    label: str | None


def find_class_folders(folder: Path) -> dict[str, list[ClassFolder]]:
    """The splits of a folder in this layout, empty if it is in another.

    Without folders for splits, the class folders make the split `train`. Unlabelled folders of any
    split make the split `unsupervised`.
    """
    splits: dict[str, list[ClassFolder]] = {}
    for inner in _sub_folders(folder):
        for class_folder in filter(_holds_texts, _sub_folders(inner)):
            _add(splits, inner.name, class_folder)
    if not splits:
        # Only now: aclImdb's `train` has lists of addresses beside its class folders.
        for class_folder in filter(_holds_texts, _sub_folders(folder)):
            _add(splits, "train", class_folder)
    return splits


def read_class_folders(folders: Sequence[ClassFolder]) -> tuple[datasets.Dataset, str]:
    """Read every text of a split, in the order of class names and file names.

    Returns:
        The table (`text`, and `label` by name where there are labels), and the SHA-256 of the
        class names, file names and texts.

    Raises:
        UserError: if a file is not UTF-8 text.
    """
    digest = hashlib.sha256()
    texts: list[str] = []
    labels: list[str | None] = []
    for folder in folders:
        for path in sorted(folder.path.glob("*.txt")):
            content = path.read_bytes()
            for part in (folder.path.name.encode(), path.name.encode(), content):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
            texts.append(_decode(content, path))
            labels.append(folder.label)
    columns: dict[str, list[str] | list[str | None]] = {"text": texts}
    if any(label is not None for label in labels):
        columns["label"] = labels
    return datasets.Dataset.from_dict(columns), digest.hexdigest()


def _add(splits: dict[str, list[ClassFolder]], split: str, path: Path) -> None:
    unlabeled = path.name.lower() in _UNLABELED_FOLDERS
    folder = ClassFolder(path, None if unlabeled else path.name)
    splits.setdefault(UNSUPERVISED_SPLIT if unlabeled else split, []).append(folder)


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _holds_texts(folder: Path) -> bool:
    return next(folder.glob("*.txt"), None) is not None


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.parent.name}/{path.name} is not UTF-8 text ({error.reason} at byte "
            f"{error.start}): save it as UTF-8"
        ) from error
