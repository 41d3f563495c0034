"""Local files and folders: which splits they hold, and their tables as `datasets` reads them.

Nothing is ever written beside the source: the Arrow copies go to the `datasets` cache, in a folder
named by the content's hash, so a file that changed without its time changing is read anew.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import datasets
import pyarrow as pa
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.opening import SourceUnavailable, quiet_datasets

TxtUnit = Literal["line", "paragraph", "document"]

_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, "": open}
_SPLIT_NAMES = (
    "train",
    "test",
    "validation",
    "valid",
    "val",
    "dev",
    "unsupervised",
    "unlabeled",
    "unlabelled",
)
# The hub writes a split as `train-00000-of-00003.parquet`.
_PART_SUFFIX = re.compile(r"-\d+-of-\d+$")
# Class folders that hold documents nobody labelled; they make up a split of their own.
_UNLABELED_FOLDERS = ("unsup", "unsupervised", "unlabeled", "unlabelled")
UNSUPERVISED_SPLIT = "unsupervised"


@dataclass(frozen=True)
class ClassFolder:
    """One folder of text files; `label` is its name, or None where nobody labelled them."""

    path: Path
    label: str | None


def file_kind(path: Path) -> str | None:
    """The extension that says how a file is read (`.csv` for `x.csv.gz`), None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in (".gz", ".bz2")
    if compressed:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else None
    if kind not in _BUILDERS or (compressed and kind == ".parquet"):
        return None
    return kind


def known_extensions() -> str:
    """The extensions that can be read, for a message."""
    return f"{', '.join(_BUILDERS)} (all but .parquet also with .gz or .bz2)"


def split_name(path: Path) -> str:
    """The split a file holds: its name without extensions and part numbers."""
    return _PART_SUFFIX.sub("", path.name.split(".")[0])


def find_split_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder by split: those named like splits here or one level down, else all here.

    Raises:
        UserError: if one split lies in several folders.
    """
    here = _data_files(folder)
    inner_folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    below = [path for inner in inner_folders for path in _data_files(inner)]
    splits = _by_split(path for path in here + below if split_name(path) in _SPLIT_NAMES)
    for split, files in splits.items():
        holders = sorted({path.parent.name for path in files})
        if len(holders) > 1:
            raise UserError(
                f"the split {split!r} is in {' and in '.join(holders)}: give the one folder to read"
            )
    return splits or _by_split(here)


def _by_split(files: Iterable[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(split_name(path), []).append(path)
    return splits


def _data_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and file_kind(path)
    ]


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 of one file's bytes, or of the hashes of several in the order given."""
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_files(
    files: Sequence[Path], content_sha256: str, *, txt_unit: TxtUnit = "line"
) -> datasets.Dataset:
    """Read files of one kind as one table.

    Args:
        files: in the order of their documents.
        content_sha256: of the files, which names the folder of their Arrow copy.
        txt_unit: what of a .txt file is a document: a line, what stands between empty lines, or
            the whole file.

    Raises:
        UserError: if they are of several kinds, or cannot be read as what they are called.
    """
    kinds = {file_kind(path) for path in files}
    if len(kinds) > 1 or None in kinds:
        raise UserError(
            f"the split {split_name(files[0])!r} has files of several kinds "
            f"({', '.join(path.name for path in files)}): keep one kind"
        )
    kind = kinds.pop() or ""
    empty = [path.name for path in files if path.stat().st_size == 0]
    if empty:
        raise SourceUnavailable(f"{empty[0]} is empty: give a file with documents in it")
    options: dict[str, Any] = {"sample_by": txt_unit} if kind == ".txt" else {}
    if _BUILDERS[kind] == "csv":
        options = _csv_options(files, kind)
    cache = Path(datasets_config.HF_DATASETS_CACHE) / "teacher_cache" / content_sha256[:16]
    names = ", ".join(path.name for path in files[:3]) + (", ..." if len(files) > 3 else "")
    with quiet_datasets():
        try:
            builder = datasets.load_dataset_builder(
                _BUILDERS[kind],
                data_files={"train": [glob.escape(str(path.absolute())) for path in files]},
                cache_dir=str(cache),
                **options,
            )
            builder.download_and_prepare()
        except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{names} cannot be read as {kind.lstrip('.')} ({root_cause(error)}): mend the "
                f"file, or give it the extension of what it is"
            ) from error
        if not builder.info.splits or not builder.info.splits["train"].num_examples:
            raise SourceUnavailable(f"{names} holds no documents: give a file with some in it")
        table = builder.as_dataset(split="train")
    return cast(datasets.Dataset, table)


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause: the readers wrap theirs in a general sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _csv_options(files: Iterable[Path], kind: str) -> dict[str, Any]:
    """Read every column as text: `NA` stays a text, `007` too, and parts agree on their types.

    Raises:
        UserError: if a file's first row does not have one field for each column; the reader
            would take the surplus for an index and shift every column.
    """
    separator = "\t" if kind == ".tsv" else ","
    columns: list[str] = []
    for path in files:
        opener = _OPENERS[path.suffix if path.suffix in _OPENERS else ""]
        try:
            with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
                rows = csv.reader(stream, delimiter=separator)
                columns = next(rows, [])
                first = next(rows, columns)
        except (UnicodeDecodeError, csv.Error, EOFError, OSError) as error:
            raise UserError(
                f"{path.name} cannot be read as {kind.lstrip('.')} ({error}): save it as UTF-8 text"
            ) from error
        if len(first) > len(columns):
            raise UserError(
                f"{path.name} has {len(columns)} columns and {len(first)} fields in its first "
                f"row: put quotes around texts that hold a {'tab' if kind == '.tsv' else 'comma'}"
            )
    return {
        "sep": separator,
        "features": datasets.Features({name: datasets.Value("string") for name in columns}),
        "keep_default_na": False,
        "na_values": [""],
    }


def find_class_folders(folder: Path) -> dict[str, list[ClassFolder]]:
    """The splits of a folder of text files, a sub-folder a class; empty of another one.

    This is aclImdb's layout, `{train,test}/{neg,pos}/*.txt` with `train/unsup/*.txt`, and the
    simpler `{neg,pos}/*.txt`.
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
