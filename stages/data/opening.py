"""What every way of opening a source shares: silence, the split to read, and the failure."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa
from datasets.utils import logging as datasets_logging

from teacher_cache.cache.errors import UserError, did_you_mean


class SourceUnavailable(UserError):
    """A source is not there, cannot be reached or holds nothing: another may be tried instead."""


# What people call their splits; the first of each is what presets and defaults ask for.
ROLES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development"),
    "unsupervised": ("unsupervised", "unsup", "unlabeled", "unlabelled"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_NUMBER = re.compile(r"[-_. ]?\d+$")


def split_role(name: str) -> str | None:
    """What a split, file or folder of this name is for: a key of `ROLES`, None if nothing says.

    >>> split_role("training"), split_role("imdb_Dev"), split_role("chapter1")
    ('train', 'validation', None)
    """
    if name.lower() in ROLE_OF:
        return ROLE_OF[name.lower()]
    words = [_NUMBER.sub("", word) for word in re.split(r"[-_. ]+", name.lower())]
    found = {ROLE_OF[word] for word in words if word in ROLE_OF}
    return found.pop() if len(found) == 1 else None


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn the bars and log messages of `datasets`, which break into ours, off and back again."""
    had_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def choose_split(splits: Sequence[str], wanted: str | None, source: str) -> str:
    """The wanted split, or without a wish `train` or the only one; `dev` is a `validation`.

    Args:
        splits: the names there are.
        wanted: the name asked for.
        source: what to call the source in a message.

    Raises:
        UserError: if it is not there, none was asked for where there are several, or several are
            what is meant.
    """
    listed = f"it has {', '.join(splits)}"
    asked = wanted or "train"
    if asked in splits:
        return asked
    if wanted is None and len(splits) == 1:
        return splits[0]
    role = split_role(asked) if asked.lower() in ROLE_OF else None
    alike = [name for name in splits if role is not None and split_role(name) == role]
    exact = [name for name in alike if name.lower() in ROLE_OF]
    alike = exact if len(exact) == 1 else alike
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise UserError(
            f"{source} has several splits that may be {asked!r} ({', '.join(alike)}): name one "
            "with --split, or files with a pattern such as 'folder/train*.csv'"
        )
    if wanted is not None and "+" in wanted:
        raise several_splits(wanted)
    if wanted is not None:
        raise UserError(
            f"{source} has no split {wanted!r} ({listed}): {did_you_mean(wanted, splits)}"
        )
    raise UserError(f"{source} has no split 'train' ({listed}): name the split to read")


def several_splits(wanted: str) -> UserError:
    """The sentence on splits that are joined as `datasets` does."""
    return UserError(
        f"--split {wanted} joins splits, and one is read at a time: name one of them, or give "
        "files of several as one pattern, such as 'folder/[te]*.csv'"
    )


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 of one file's bytes, or of the hashes of several in the order given."""
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause: the readers wrap theirs in a general sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unreadable(path: Path, kind: str, reason: str, way_on: str = "") -> UserError:
    """The sentence on a file that is not what it is called."""
    way_on = way_on or "mend the file, or give it the extension of what it is"
    return UserError(f"{path.name} cannot be read as {kind.lstrip('.')} ({reason}): {way_on}")


def _arrow_stream(path: Path) -> Any:
    return BufferedReader(pa.input_stream(str(path), compression="detect"))  # type: ignore[arg-type]


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _arrow_stream,
    ".lz4": _arrow_stream,
}
"""How a compressed file is opened, by its extension."""


_MARKS = {  # the longer ones first, whose beginning a shorter one is
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What a file is that begins so, and no text; what is known by its name ends in that.
_FOREIGN = {
    b"version https://git-lfs": "a pointer of git-lfs in the place of the file: run `git lfs pull`",
    b"\x1f\x8b": "compressed by gzip: end its name in .gz",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as csv",
    b"\xd0\xcf\x11\xe0": "a spreadsheet: save it as csv",
    b"PAR1": "parquet: end its name in .parquet",
    b"ARROW1": "arrow: end its name in .arrow",
    b"\xfd7zXZ": "compressed by xz: end its name in .xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: end its name in .zst",
    b"SQLite format 3": "a data base: export a table as csv",
    b"%PDF-": "a PDF: save its text",
}
LONGEST_BEGIN = 32  # bytes that tell


def foreign(begin: bytes) -> str | None:
    """What a file is that begins so, and what to do with it; None if it may be text."""
    return next((what for mark, what in _FOREIGN.items() if begin.startswith(mark)), None)


def encoding_of(begin: bytes) -> str:
    """How a text is encoded that begins so: in UTF-8, unless a byte-order mark says otherwise.

    Args:
        begin: its first `LONGEST_BEGIN` bytes.

    Raises:
        UnicodeError: if it is no text, or its first two bytes are a Latin letter's in UTF-16.
    """
    if found := foreign(begin):
        raise UnicodeError(f"it is {found}")
    if begin[:2].count(0) == 1:
        raise UnicodeError("it seems to be UTF-16 without a byte-order mark: save it as UTF-8 text")
    return next((name for mark, name in _MARKS.items() if begin.startswith(mark)), "utf-8-sig")


@contextmanager
def open_text(path: Path, kind: str, newline: str | None = None) -> Iterator[TextIO]:
    """A text file, compressed or not, without a byte-order mark.

    Args:
        path: the file.
        kind: what it is read as, for a message.
        newline: as in `open`.

    Raises:
        UserError: if it is neither UTF-8 nor UTF-16 or UTF-32 with its mark, naming the line; or
            not compressed as it is called.
    """
    opener = COMPRESSED.get(path.suffix.lower(), lambda one: one.open("rb"))
    try:
        with opener(path) as stream:
            encoding = encoding_of(stream.read(LONGEST_BEGIN))
        with opener(path) as stream, TextIOWrapper(stream, encoding, newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        reason = f"{error}, in line {_bad_line(opener, path)}"
        raise unreadable(path, kind, reason, "save it as UTF-8 text") from error
    except UnicodeError as error:
        raise UserError(f"{path.name} cannot be read as {kind.lstrip('.')}: {error}") from error
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise unreadable(path, kind, root_cause(error)) from error


def _bad_line(opener: Callable[[Path], Any], path: Path) -> int:
    """The first line that cannot be decoded."""
    with opener(path) as stream:
        content = stream.read()
    encoding = encoding_of(content[:LONGEST_BEGIN])
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.decode(encoding, "ignore").count("\n") + 1
