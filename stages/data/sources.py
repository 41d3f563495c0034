"""From the name of a source to its table: packaged texts, files, a folder, a URL or the hub."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import logging
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import datasets
import fsspec
import pyarrow as pa
from datasets import ReadInstruction
from datasets import config as datasets_config

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.hub import Beginning, read_hub
from teacher_cache.stages.data.layout import (
    ClassFolder,
    Files,
    Layout,
    Saved,
    Split,
    file_kind,
    known_extensions,
    layout_of_folder,
    layout_of_pattern,
    read_class_folders,
    split_name,
)
from teacher_cache.stages.data.opening import (
    SourceUnavailable,
    choose_split,
    content_hash,
    quiet_datasets,
    root_cause,
    several_splits,
    split_role,
)
from teacher_cache.stages.data.packaged import austen, reviews
from teacher_cache.stages.data.tables import Format, table_of

logger = logging.getLogger(__name__)


class _Packaged(NamedTuple):
    called: str
    splits: Sequence[str]
    read: Callable[[str], tuple[datasets.Dataset, str]]


_PACKAGED = {
    reviews.NAME: _Packaged("the reviews", reviews.SPLITS, reviews.read_reviews),
    austen.NAME: _Packaged("the novels", tuple(austen.SPLITS), austen.read_austen),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?(@[\w./-]+)?")
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::|://)", re.IGNORECASE)
_USUAL = Format()
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tbz2", ".txz")


@dataclass(frozen=True)
class Source:
    """One split of a source.

    Attributes:
        schema: its columns.
        read: the table of some of them, its documents in their own order.
        split: its name.
        label: what `Document.source` says: a name with its revision, or a content hash.
        identity: the same in parts, for the fingerprint; never a path.
        part: of the split, as `datasets` writes it (`[:10%]`); None is all of it.
        notes: what a person is told of how it is read.
        left_out: files that are not, by the reason.
        folders: that its files lie in, where those are several.
    """

    schema: pa.Schema
    read: Callable[[Sequence[str]], datasets.Dataset]
    split: str
    label: str
    identity: dict[str, str]
    part: str | None = None
    notes: Sequence[str] = ()
    left_out: dict[str, list[str]] = field(default_factory=dict)
    folders: Sequence[str] = ()

    def rows(self, num: int) -> range:
        """Of a split of so many, those that were asked for.

        Raises:
            SourceUnavailable: if that is none.
            UserError: if the part is not written as `datasets` does.
        """
        if self.part is None:
            return range(num)
        asked = f"--split {self.split}{self.part}"
        try:
            (found,) = ReadInstruction.from_spec(f"part{self.part}").to_absolute({"part": num})
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"{asked} cannot be read ({root_cause(error)}): name a part as in train[:10%], "
                "train[100:200] or train[-50:]"
            ) from error
        if found.from_ >= found.to:
            raise SourceUnavailable(f"{asked} holds none of {num:,} documents: give another part")
        return range(found.from_, found.to)


def offered_splits(source: str) -> tuple[str, ...] | None:
    """The splits of packaged texts or of several files; None where only reading would tell."""
    if source in _PACKAGED:
        return tuple(_PACKAGED[source].splits)
    if is_single(source):
        return None
    with _permitted(source):
        layout = _layout(_located(source))
    return None if layout is None else layout.names


def is_single(source: str) -> bool:
    """Whether a source is a file, here or elsewhere, or a pattern of files: it is read whole."""
    path = Path(source).expanduser()
    is_archive = path.name.lower().endswith(_ARCHIVES)
    is_named = bool(_URL.match(source)) and file_kind(path) is not None
    return not is_archive and (path.is_file() or is_named or glob.has_magic(source))


def own_split(source: str, roles: Sequence[str]) -> str | None:
    """The split of packaged texts or of several files that is for the first of these, or None."""
    offered = offered_splits(source) or ()
    for role in roles:
        alike = [name for name in offered if split_role(name) == role]
        if alike:  # of several, opening them says that they are
            return role if len(alike) > 1 else alike[0]
    return None


def open_source(
    source: str,
    split: str | None,
    *,
    written: Format = _USUAL,
    beginning: Beginning | None = None,
) -> Source:
    """Find one split of a source.

    Args:
        source: `reviews`, `austen`, a file, a pattern of files, a folder or archive of them, a URL
            of any of these, or a hub id (`id:subset@revision`), tried in this order.
        split: its name, None for `train` or the only one; a part of it as in `train[:10%]`.
        written: how its files are.
        beginning: stream only this part of a hub data set.

    Raises:
        SourceUnavailable: if there is no such source, or nothing in it.
        UserError: if it has no such split, cannot be read, or has no files that heed `written`.
    """
    name, part = _sliced(split)
    found = _open(source, name, written, beginning)
    if beginning is not None and found.identity["kind"] != "hub":
        raise UserError(f"{source!r} is here, so nothing of it has to be streamed: read it whole")
    if beginning is not None and part:
        raise UserError(
            f"--split {split} is a part, and a streamed text is read from its beginning"
        )
    for name, value in written.given.items():
        if name not in found.identity:
            kinds = ".txt" if name == "txt_unit" else ".csv and .tsv"
            raise UserError(
                f"--{name.replace('_', '-')} {value} is for {kinds} files, and {source!r} is read "
                "from none: leave it out, or give such files"
            )
    if part is None:
        return found
    # Absent where all is read, so that caches from before it keep their fingerprints.
    return dataclasses.replace(found, part=part, identity={**found.identity, "part": part})


def _sliced(split: str | None) -> tuple[str | None, str | None]:
    """A split's name and, behind it, the part that is asked for."""
    if split is None or not split.endswith("]"):
        return split, None
    if "]+" in split:
        raise several_splits(split)
    name, _, part = split.partition("[")
    return name or None, f"[{part}"


def _open(source: str, split: str | None, written: Format, beginning: Beginning | None) -> Source:
    if source in _PACKAGED:
        return _open_packaged(source, split)
    with _permitted(source):
        path = _located(source)
        layout = _layout(path)
        if layout is not None:
            return _open_layout(layout, path.name, split, written)
        if path.is_file():
            return _open_file(path, split, written)
    if not _HUB_ID.fullmatch(source) or file_kind(path) is not None:
        raise SourceUnavailable(
            f"there is no file or folder {source!r}: check the path, or give a data set of the hub"
        )
    table, chosen, revision = read_hub(source, split, beginning)
    name = source.partition("@")[0]
    identity = {"kind": "hub", "name": name, "revision": revision, "split": chosen}
    return _source_of(table, chosen, f"{name}@{revision}", identity)


@contextmanager
def _permitted(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{source!r} cannot be read ({error.strerror or error}): check its permissions"
        ) from error


def _source_of(table: datasets.Dataset, split: str, label: str, identity: dict[str, str]) -> Source:
    return Source(
        schema=table.features.arrow_schema,
        read=lambda names: table.select_columns(list(names)),
        split=split,
        label=label,
        identity=identity,
    )


def _open_packaged(name: str, split: str | None) -> Source:
    packaged = _PACKAGED[name]
    chosen = choose_split(packaged.splits, split, packaged.called)
    table, revision = packaged.read(chosen)
    identity = {"kind": "packaged", "name": name, "revision": revision, "split": chosen}
    return _source_of(table, chosen, f"{name}@{revision}", identity)


def _open_file(path: Path, split: str | None, written: Format) -> Source:
    if file_kind(path) is None:
        raise UserError(
            f"{path.name} has an unknown extension, expected one of {known_extensions()}, or an "
            f"archive ({', '.join(_ARCHIVES)}): convert or rename the file"
        )
    chosen = choose_split([split_name(path)], split, path.name)
    return _local_files("file", Files((path,)), chosen, written)


def _located(source: str) -> Path:
    """Where a source lies on this machine, if it does; an archive is the folder of its files."""
    path = _fetched(source) if _URL.match(source) else Path(source).expanduser()
    return _unpacked(path) if path.name.lower().endswith(_ARCHIVES) and path.is_file() else path


def _layout(path: Path) -> Layout | None:
    """Of a folder, or the files of a pattern; None of a file, or where nothing is.

    Raises:
        SourceUnavailable: if there is no file that can be read.
    """
    if path.is_dir():
        layout = layout_of_folder(path)
    elif not path.exists() and glob.has_magic(str(path)):
        found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
        layout = layout_of_pattern([one for one in found if one.is_file()])
    else:
        return None
    if not layout.names:
        raise SourceUnavailable(
            f"{path.name!r} holds no documents, expected train/neg/*.txt (or the like), or files "
            f"such as train.csv of {known_extensions()}: give another folder, or one file"
        )
    return layout


def _open_layout(layout: Layout, name: str, split: str | None, written: Format) -> Source:
    chosen, found = layout.choose(split, name)
    source = _opened(found, chosen, written)
    read = found.paths if isinstance(found, Files) else ()
    others = [
        name
        for name, one in layout.splits.items()
        if name != chosen and not (isinstance(one, Files) and {*one.paths} <= {*read})
    ]
    notes = [f"other splits there: {', '.join(others)}"] if others else []
    return dataclasses.replace(source, notes=[*source.notes, *notes], left_out=layout.left(chosen))


def _opened(found: Split, chosen: str, written: Format) -> Source:
    if isinstance(found, Files):
        return _local_files("folder", found, chosen, written)
    if isinstance(found, Saved):
        return _saved(found, chosen)
    table, digest = read_class_folders(cast(tuple[ClassFolder, ...], found))
    return _source_of(table, chosen, f"sha256:{digest}", _identity("folder", digest, chosen))


def _saved(found: Saved, chosen: str) -> Source:
    """What `datasets` saved to the disk, whose files are in its own order."""
    try:
        with quiet_datasets():
            table = cast(datasets.Dataset, datasets.load_from_disk(str(found.path)))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{found.path.name} cannot be read as `save_to_disk` writes it ({root_cause(error)}): "
            "save it again"
        ) from error
    if not len(table):
        raise SourceUnavailable(f"{found.path.name} holds no documents: give another")
    digest = content_hash([Path(one["filename"]) for one in table.cache_files])
    return _source_of(table, chosen, f"sha256:{digest}", _identity("folder", digest, chosen))


def _local_files(kind: str, files: Files, split: str, written: Format) -> Source:
    table = table_of(files.paths, files.kind, written)
    folders = sorted({path.parent.name for path in files.paths})
    digest = content_hash(files.paths)
    # What is at its default is absent, so that caches from before it keep their fingerprints.
    identity = {**_identity(kind, digest, split), **table.given}
    return Source(
        schema=table.schema,
        read=lambda names: table.read(names, digest),
        split=split,
        label=f"sha256:{digest}",
        identity=identity,
        notes=[*([f"files read: {table.named}"] if len(files.paths) > 1 else []), *table.notes],
        folders=folders if len(folders) > 1 else (),
    )


def _identity(kind: str, digest: str, split: str) -> dict[str, str]:
    return {"kind": kind, "content_sha256": digest, "split": split}


def _cache_folder(kind: str, name: str) -> Path:
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path(datasets_config.HF_DATASETS_CACHE) / "teacher_cache" / kind / digest


def _unpacked(path: Path) -> Path:
    """The folder of an archive's files, in the cache of `datasets`; a single one inside is it.

    Raises:
        UserError: if it cannot be unpacked.
    """
    folder = _cache_folder("unpacked", content_hash([path])) / path.name.split(".")[0]
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            if path.suffix.lower() == ".zip":
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(part)
            else:
                with tarfile.open(path) as archive:
                    archive.extractall(part, filter="data")
            part.mkdir(parents=True, exist_ok=True)
            part.rename(folder)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, OSError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"{path.name} cannot be unpacked to {folder.parent} ({root_cause(error)}): mend "
                "it, free the disk, or name a folder on another one with the environment variable "
                "HF_DATASETS_CACHE"
            ) from error
    inner = [one for one in folder.iterdir() if one.name[0] != "." and one.name != "__MACOSX"]
    return (
        inner[0]
        if len(inner) == 1 and inner[0].is_dir() and not split_role(inner[0].name)
        else folder
    )


def _fetched(url: str) -> Path:
    """A copy of what a URL names, in the cache of `datasets`; fetched each time, as it may change.

    Returns:
        A file, a folder, or of a pattern the folder of the files that fit.

    Raises:
        SourceUnavailable: if there is no such file, or no way to it.
    """
    folder = _cache_folder("fetched", url)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        system, path = fsspec.core.url_to_fs(url)
        name = PurePosixPath(re.sub(r"[?#].*", "", path).rstrip("/")).name or "data"
        local = folder / name
        if glob.has_magic(path) and not system.exists(path):
            above = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]
            for one in sorted(system.glob(path)):
                copy = folder / one.removeprefix(above).lstrip("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(one, str(copy))
            local = folder / "**" / "*"
        elif file_kind(local) or name.lower().endswith(_ARCHIVES) or not system.isdir(path):
            system.get_file(path, str(local))
        else:
            system.get(path, str(local), recursive=True)
    # Each file system of fsspec raises what its own library does.
    except (OSError, ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        raise SourceUnavailable(
            f"{url} could not be fetched ({root_cause(error)}): check it, install what `fsspec` "
            "needs for it, or give a local copy"
        ) from error
    return local
