"""What a folder holds: which splits, of which files, and what is left out and why."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.opening import (
    COMPRESSED,
    LONGEST_BEGIN,
    ROLE_OF,
    choose_split,
    encoding_of,
    split_role,
)
from teacher_cache.stages.data.tables import TABULAR

# The hub writes a split as `train-00000-of-00003.parquet`.
_PART = re.compile(r"-(\d+)-of-(\d+)$")
_NUMBER = re.compile(r"[-_. ]?(\d+)$")
# What archives and tools leave beside data.
_FOREIGN = ("__MACOSX",)
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
UNSUPERVISED_SPLIT = "unsupervised"
NUM_NAMED = 5
_UNKNOWN = "no kind of file that can be read"


@dataclass(frozen=True)
class ClassFolder:
    """One folder of text files; `label` is its name, or None where nobody labelled them."""

    path: Path
    label: str | None


@dataclass(frozen=True)
class Files:
    """Files of one kind that make a split, in the order of their documents."""

    paths: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """How they are read.

        Raises:
            UserError: if they are of several kinds, or one is there twice.
        """
        kinds = {file_kind(path) for path in self.paths}
        names = ", ".join(path.name for path in self.paths)
        if len(kinds) > 1 or None in kinds:
            raise UserError(
                f"the split {split_name(self.paths[0])!r} has files of several kinds ({names}): "
                "keep one kind, or give the file to read"
            )
        bases = [(path.parent, path.name.split(".")[0]) for path in self.paths]
        if len(set(bases)) < len(bases):
            raise UserError(
                f"the split {split_name(self.paths[0])!r} has a file twice ({names}): keep one, or "
                "give the file to read"
            )
        return kinds.pop() or ""


@dataclass(frozen=True)
class Saved:
    """A folder that `datasets` saved (`save_to_disk`)."""

    path: Path


Split = Files | Saved | tuple[ClassFolder, ...]


@dataclass
class Layout:
    """The splits of a folder, or of several files.

    Attributes:
        splits: by name.
        others: data files that are named like no split where some are.
        left_out: what is not read whatever the split, and why.
    """

    splits: dict[str, Split] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Splits that there are; of files that are named like none, their own names."""
        return tuple(self.splits) or tuple(_by_stem(self.others))

    def leave_out(self, path: Path, reason: str) -> None:
        """Remember a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(path.name)

    def left(self, chosen: str) -> dict[str, list[str]]:
        """Files that are not read with this split, by the reason; other splits are offered."""
        if not self.splits or chosen not in self.splits or not self.others:
            return self.left_out
        return {**self.left_out, "named like no split": [path.name for path in self.others]}

    def choose(self, wanted: str | None, name: str) -> tuple[str, Split]:
        """A split, by its name or what it is for; by default the one to train on.

        Args:
            wanted: None for `train`, or all there is.
            name: of the folder, in messages.

        Raises:
            UserError: if it is not there, or what is meant is not certain.
        """
        by_stem = _by_stem(self.others)
        if wanted in by_stem and wanted not in self.splits:
            return wanted, Files(tuple(by_stem[wanted]))
        if not self.splits and wanted is None:
            if len(by_stem) == 1:
                return next(iter(by_stem)), Files(tuple(self.others))
            return "train", Files(tuple(self.others))
        if not self.splits:
            return choose_split(list(by_stem), wanted, name), Files(())
        parts = self._numbered(wanted or "train")
        if parts:
            return parts
        if self.others and wanted is None and len(self.splits) == 1:
            (only,) = self.splits
            if split_role(only) != "train":
                raise UserError(
                    f"{name} has the split {only} and files that are named like no split "
                    f"({_few(self.others)}): name one with --split, or all files with a pattern "
                    f"such as '{name}/*{self.others[0].suffix}'"
                )
        chosen = choose_split(list(self.splits), wanted, name)
        return chosen, self.splits[chosen]

    def _numbered(self, wanted: str) -> tuple[str, Split] | None:
        """Files `train1`, `train2`, ... that make one split; None if there are no such."""
        if wanted in self.splits:
            return None
        alike = [one for one in self.splits if split_role(one) == split_role(wanted) is not None]
        stems = {_NUMBER.sub("", one) for one in alike}
        if len(alike) < 2 or len(stems) > 1 or not all(map(_NUMBER.search, alike)):
            return None
        paths: list[Path] = []
        for one in sorted(alike, key=lambda one: int((_NUMBER.search(one) or [0, 0])[1])):
            found = self.splits[one]
            if not isinstance(found, Files):
                return None
            paths += found.paths
        return stems.pop(), Files(tuple(paths))


def file_kind(path: Path) -> str | None:
    """The extension that says how a file is read (`.csv` for `x.csv.gz`), None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else None
    if kind not in TABULAR or (compressed and kind in (".parquet", ".arrow", ".feather")):
        return None
    return kind


def known_extensions() -> str:
    """The extensions that can be read, for a message."""
    texts = [kind for kind in TABULAR if kind not in (".parquet", ".arrow", ".feather")]
    return f"{', '.join(texts)} (also with {', '.join(COMPRESSED)}), .parquet, .arrow, .feather"


def split_name(path: Path) -> str:
    """The split a file holds: its name without extensions and part numbers."""
    return _PART.sub("", path.name.split(".")[0])


def layout_of_folder(folder: Path) -> Layout:
    """The splits of a folder.

    In this order: what `datasets` saved; files that are called like splits, here or one level down;
    text files in a folder for each class, `{train,test}/{neg,pos}/*.txt` with `train/unsup/*.txt`
    as in aclImdb, or `{neg,pos}/*.txt`; files with a split's name somewhere in theirs or in their
    folder's; all files that lie here.

    Raises:
        UserError: if one split lies in several folders, a part of one is missing, or a class has
            no text that can be read.
    """
    layout = Layout()
    only = _only_folder(folder)
    if only is not None:
        return layout_of_folder(only)
    if (folder / SAVED_SPLITS).is_file() or (folder / SAVED).is_file():
        inner = [path for path in _sub_folders(folder) if (path / SAVED).is_file()]
        layout.splits = {path.name: Saved(path) for path in inner} or {"train": Saved(folder)}
        return layout
    files = _files(folder)
    classes = {} if _names_splits(folder, files) else find_class_folders(folder, layout)
    if classes:
        layout.splits.update(classes)
        for path in files:
            if path.parent == folder:
                layout.leave_out(path, "beside the folders of the classes")
        return layout
    return layout_of_files(files, folder, layout)


def _only_folder(folder: Path) -> Path | None:
    """The folder in this one that all its data are in, if it is neither a split's nor a class's."""
    inner = _sub_folders(folder)
    if len(inner) != 1 or split_role(inner[0].name) is not None or not _sub_folders(inner[0]):
        return None
    here = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return None if here else inner[0]


def _names_splits(folder: Path, files: Sequence[Path]) -> bool:
    """Whether a file here or one level down is called like a split; a class may have a test.txt."""
    called = {path for path in files if split_name(path).lower() in ROLE_OF and file_kind(path)}
    of_texts = {path.parent for path in files if file_kind(path) == ".txt" and path not in called}
    return any(
        path.parent == folder
        or (
            path.parent.parent == folder
            and not (path.parent in of_texts and file_kind(path) == ".txt")
        )
        for path in called
    )


def layout_of_pattern(files: Sequence[Path]) -> Layout:
    """Files that fit a pattern: all of them, unless they are of several splits."""
    readable = [path for path in files if file_kind(path) is not None]
    if len({split_role(split_name(path)) for path in readable} - {None}) > 1:
        return layout_of_files(files, Path(files[0].anchor or "."))
    layout = Layout()
    for path in sorted(set(files) - set(readable)):
        layout.leave_out(path, _UNKNOWN)
    if readable:
        layout.splits[_split_together(readable)] = Files(tuple(readable))
    return layout


def _split_together(files: Sequence[Path]) -> str:
    """What files of one split are called: their own name, or else what they are for."""
    names = {split_name(path) for path in files}
    roles = {split_role(name) for name in names}
    return names.pop() if len(names) == 1 else (roles.pop() if len(roles) == 1 else None) or "train"


def layout_of_files(files: Sequence[Path], folder: Path, layout: Layout | None = None) -> Layout:
    """The splits of some files below a folder.

    Raises:
        UserError: if one split lies in several folders, or a part of one is missing.
    """
    layout = layout or Layout()
    named: dict[str, list[Path]] = {}
    holders: dict[str, set[Path]] = {}
    for path in files:
        if file_kind(path) is None:
            layout.leave_out(path, _UNKNOWN)
            continue
        found = _split_of(path, folder)
        if found is None:
            layout.others.append(path)
        else:
            named.setdefault(found[0], []).append(path)
            holders.setdefault(found[0], set()).add(found[1])
    for split, where in holders.items():
        if len(where) > 1:
            raise UserError(
                f"the split {split!r} is in {' and in '.join(sorted(one.name for one in where))}: "
                "give the one folder to read"
            )
    for split, paths in named.items():
        _require_all_parts(split, paths)
        layout.splits[split] = Files(tuple(paths))
    here = [path for path in layout.others if path.parent == folder]
    inner = sorted({path.parent.name for path in layout.others if path.parent != folder})
    if not named and len(inner) > 1 and not here:
        raise UserError(
            f"the folder {folder.name} has data in {' and in '.join(inner)}, which are called like "
            "no splits: give the one folder to read, or files with a pattern such as "
            f"'{folder.name}/*/*.csv'"
        )
    if not named and here:
        for path in layout.others:
            if path not in here:
                layout.leave_out(path, "in a folder of no split or class")
        layout.others = here
    return layout


def _split_of(path: Path, folder: Path) -> tuple[str, Path] | None:
    """The split that a file, or else the nearest folder, is named like; and where that lies."""
    if split_role(split_name(path)) is not None:
        return split_name(path), path.parent
    for parent in path.parents:
        if parent == folder or folder not in parent.parents:
            return None
        if split_role(parent.name) is not None:
            return parent.name, parent.parent
    return None


def _require_all_parts(split: str, paths: Iterable[Path]) -> None:
    """Refuse `train-00001-of-00002` without the other."""
    numbers: dict[int, set[int]] = {}
    for path in paths:
        if found := _PART.search(path.name.split(".")[0]):
            numbers.setdefault(int(found[2]), set()).add(int(found[1]))
    for total, found in numbers.items():
        if len(found) < total:
            raise UserError(
                f"the split {split!r} has {len(found)} of {total} parts: fetch the others, or "
                "rename what is to be read as a whole"
            )


def _by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = {}
    for path in files:
        stems.setdefault(split_name(path), []).append(path)
    return stems


def _files(folder: Path) -> list[Path]:
    """All files below, in the order of their paths, without hidden ones."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    for inner in _sub_folders(folder):
        found += _files(inner)
    return found


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and path.name[0] != "." and path.name not in _FOREIGN
    )


def _few(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:NUM_NAMED])
    return names + (f" and {len(paths) - NUM_NAMED} others" if len(paths) > NUM_NAMED else "")


def find_class_folders(folder: Path, layout: Layout) -> Mapping[str, tuple[ClassFolder, ...]]:
    """The splits of a folder of text files, a sub-folder a class; empty of another one.

    Without folders for splits, the class folders make the split `train`. Unlabelled folders of any
    split make the split `unsupervised`.

    Raises:
        UserError: if beside the classes is a folder of files that are no texts.
    """
    splits: dict[str, list[ClassFolder]] = {}
    inner = {one: _sub_folders(one) for one in _sub_folders(folder)}
    with_classes = {one: found for one, found in inner.items() if any(map(_texts, found))}
    if not with_classes:
        # Only now: aclImdb's `train` has lists of addresses beside its class folders.
        direct = [one for one in inner if split_role(one.name) in (None, UNSUPERVISED_SPLIT)]
        if any(split_role(one.name) is None for one in filter(_texts, direct)):
            with_classes = {folder: direct}
    for split_folder, class_folders in with_classes.items():
        name = "train" if split_folder == folder else split_folder.name
        for path in class_folders:
            texts, files = _texts(path), _files(path)
            if files and not texts:
                raise UserError(
                    f"the folder {path.name} lies beside the classes' and holds no .txt files "
                    f"({_few(files)}): rename them, or move it away"
                )
            for other in files:
                if other not in texts:
                    layout.leave_out(other, f"in {path.name}, and no .txt file of the class itself")
            is_unlabeled = split_role(path.name) == UNSUPERVISED_SPLIT
            split = UNSUPERVISED_SPLIT if is_unlabeled else name
            if texts:
                label = None if is_unlabeled else path.name
                splits.setdefault(split, []).append(ClassFolder(path, label))
    for path in inner:
        if with_classes and folder not in with_classes and path not in with_classes:
            layout.leave_out(path, "a folder without classes")
    return {split: tuple(found) for split, found in splits.items()}


def _texts(folder: Path) -> list[Path]:
    """The text files of a class, in the order of their names."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name[0] != "." and path.suffix.lower() == ".txt"
    )


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
        for path in _texts(folder.path):
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


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode(encoding_of(content[:LONGEST_BEGIN]))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.parent.name}/{path.name} is not UTF-8 text ({error}): save it as UTF-8"
        ) from error
    except UnicodeError as error:
        raise UserError(f"{path.parent.name}/{path.name} is no text: {error}") from error
