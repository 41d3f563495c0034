"""Files of fields between separators, in the dialects that people write: which one a file is in.

A file says nowhere how it was written. RFC 4180 doubles a quote inside quotes, others escape it by
a backslash, and GLUE, SST-2 or the SMS spam collection do not quote at all: there a quote that
begins a field is text, and reading it as RFC 4180 does swallows all rows up to the next one. A
dialect is believed if the whole file is well-formed in it.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.opening import open_text

Quoting = Literal["doubled", "escaped", "none"]
Lines = tuple[int, int]
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_CLASS_ID = re.compile(r"\d{1,3}", re.ASCII)
_SEP_LINE = "sep="  # of which Excel takes the separator
_SAID_OF: dict[Quoting, str] = {
    "none": "read without quoting, so that a quote is text",
    "escaped": "a backslash in front of a quote escapes it",
}


@dataclass(frozen=True, kw_only=True)
class _Malformed:
    """The first row that a dialect cannot explain."""

    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """A whole file in one dialect.

    Attributes:
        num_rows: behind the header.
        problem: the first row with more fields than columns, or that is malformed.
        short: the first row without fields of columns that have a name.
        spanned: lines of rows that take several.
    """

    num_rows: int = 0
    problem: _Malformed | None = None
    short: _Malformed | None = None
    spanned: frozenset[int] = frozenset()

    @property
    def is_whole(self) -> bool:
        """Whether every row has all its fields and no more."""
        return self.problem is None and self.short is None


@dataclass(frozen=True, kw_only=True)
class Delimited:
    """A file with its dialect.

    Attributes:
        path: of the file.
        separator: one character.
        quoting: how a field holds separators and quotes.
        header: names of the columns, as written.
        num_skipped: lines in front of the header.
        notes: what a person is told of it.
    """

    path: Path
    separator: str
    quoting: Quoting
    header: tuple[str, ...]
    num_skipped: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, separator: str) -> Delimited:
        """Find out a file's dialect.

        Args:
            path: of the file.
            separator: that its extension promises.

        Raises:
            UserError: if it is well-formed in none, naming the line.
        """
        found, num_skipped = _separator(path, separator)
        quoted = cls._in(path, found, "doubled", num_skipped)
        chosen, survey = _chosen(quoted, promised=separator)
        if survey.problem is not None:
            raise UserError(
                f"{path.name} cannot be read as {quoted._kind} (line {survey.problem.line}: "
                f"{survey.problem.reason}): put quotes around texts that hold a "
                f"{SEPARATORS[found]}, and double the quotes inside them"
            )
        if found != separator:
            chosen.notes.append(f"{path.name}: fields are separated by a {SEPARATORS[found]}")
        if chosen.quoting != "doubled":
            chosen.notes.append(f"{path.name}: {_SAID_OF[chosen.quoting]}")
        return chosen

    @classmethod
    def _in(cls, path: Path, separator: str, quoting: Quoting, num_skipped: int) -> Delimited:
        bare = cls(
            path=path, separator=separator, quoting=quoting, header=(), num_skipped=num_skipped
        )
        try:
            header = next((row for _, row in bare._records() if not _is_blank(row)), [])
        except _Strict:
            header = []  # a survey says what is wrong
        return replace(bare, header=tuple(header), notes=[])

    def _as(self, quoting: Quoting) -> Delimited:
        return self._in(self.path, self.separator, quoting, self.num_skipped)

    @property
    def _kind(self) -> str:
        return "tsv" if self.separator == "\t" else "csv"

    def rows(self, names: Sequence[str]) -> Iterator[list[str | None]]:
        """The fields of these columns, row by row; None where one is empty.

        Raises:
            UserError: if a column is there twice, or not in every row.
        """
        twice = [name for name in names if self.header.count(name) > 1]
        missing = [name for name in names if name not in self.header]
        if twice or missing:
            raise UserError(
                f"{self.path.name} has {'two columns' if twice else 'no column'} "
                f"{(twice or missing)[0]!r} (its columns are {', '.join(self.header)}): "
                f"{'rename one of them' if twice else 'write all files with the same columns'}"
            )
        idxs = [self.header.index(name) for name in names]
        for (line, _), row in self._body():
            if max(idxs) >= len(row):
                raise UserError(
                    f"{self.path.name} has {len(row)} field{'s' if len(row) > 1 else ''} in line "
                    f"{line}, and {len(self.header)} columns: write an empty field where there is "
                    "no value, or quotes around a text of several lines"
                )
            yield [row[idx] or None for idx in idxs]

    def _survey(self) -> _Survey:
        """Read the whole file."""
        num_rows, short, spanned = 0, None, set[int]()
        try:
            for (line, last), row in self._body():
                if last > line:
                    spanned.update(range(line, last + 1))
                num_rows += 1
                counts = f"{len(self.header)} columns and {len(row)} fields"
                if any(row[len(self.header) :]):
                    return _Survey(problem=_Malformed(line=line, reason=counts))
                if short is None and any(self.header[len(row) :]):
                    short = _Malformed(line=line, reason=counts)
        except _Strict as error:
            return _Survey(problem=_Malformed(line=error.line, reason=error.reason))
        return _Survey(num_rows=num_rows, short=short, spanned=frozenset(spanned))

    def _body(self) -> Iterator[tuple[Lines, list[str]]]:
        """Rows behind the header, without blank lines."""
        rows = ((lines, row) for lines, row in self._records() if not _is_blank(row, self.header))
        yield from itertools.islice(rows, 1, None)

    def _records(self) -> Iterator[tuple[Lines, list[str]]]:
        """Every record with the first and the last of its lines."""
        newline = "\n" if self.quoting == "none" else ""
        with open_text(self.path, self._kind, newline) as stream:
            for _ in range(self.num_skipped):
                stream.readline()
            if self.quoting == "none":
                for number, line in enumerate(stream, self.num_skipped + 1):
                    text = line.rstrip("\r\n")
                    yield (number, number), text.split(self.separator) if text else []
            else:
                yield from self._quoted(stream)

    def _quoted(self, stream: TextIO) -> Iterator[tuple[Lines, list[str]]]:
        csv.field_size_limit(sys.maxsize)  # its own limit is that of a careful parser
        is_escaped = self.quoting == "escaped"
        read = map(_hidden, stream) if is_escaped else stream
        reader = csv.reader(read, delimiter=self.separator, strict=True)
        while True:
            line = reader.line_num + self.num_skipped + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _Strict(line, _reason(error, self.separator)) from error
            lines = (line, reader.line_num + self.num_skipped)
            yield lines, [_shown(one) for one in row] if is_escaped else row


# Code points that no text may hold stand for what a backslash escapes while quotes are read.
_HIDDEN = {'"': "\ufdd0", "\\": "\ufdd1"}
_ESCAPED = re.compile(r'\\(["\\])')


def _hidden(line: str) -> str:
    return _ESCAPED.sub(lambda found: _HIDDEN[found[1]], line)


def _shown(text: str) -> str:
    for character, stand_in in _HIDDEN.items():
        text = text.replace(stand_in, character)
    return text


class _Strict(csv.Error):
    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line, self.reason = line, reason


def _reason(error: csv.Error, separator: str) -> str:
    """What is wrong with a row; the words of `csv` are of its parser."""
    if "expected after" in str(error):
        return (
            f"text behind a closing quote, where a {SEPARATORS[separator]} or the line's end is due"
        )
    if "unexpected end" in str(error):
        return "a quote is opened and not closed"
    return str(error)


def _chosen(quoted: Delimited, *, promised: str) -> tuple[Delimited, _Survey]:
    """The dialect of a file, and what is in it.

    Args:
        quoted: the file as RFC 4180 reads it.
        promised: separator of the file's extension.

    Raises:
        UserError: if two dialects read it, and neither is more likely.
    """
    best, found = quoted, quoted._survey()
    if not found.is_whole and _holds(quoted.path, '\\"'):
        escaped = quoted._as("escaped")
        if (survey := escaped._survey()).is_whole:
            best, found = escaped, survey
    if found.is_whole and not found.spanned:
        return best, found
    plain = quoted._as("none")
    survey = plain._survey()
    if any(name.startswith('"') for name in plain.header) or not survey.is_whole:
        return best, found
    if not found.is_whole:
        return plain, survey
    if survey.num_rows > found.num_rows:  # lines are swallowed
        if len(plain.header) > 1 and _is_repeated(plain, found.spanned):
            return plain, survey
        if len(plain.header) == 1 and promised == "\t":
            raise UserError(
                f"{quoted.path.name} can be read in two ways: {found.num_rows:,} documents with "
                f"quotes around some, or {survey.num_rows:,}, one a line: call it .csv for the "
                "first, or take the header away and call it .txt for the second"
            )
    return best, found


def _is_repeated(plain: Delimited, spanned: frozenset[int]) -> bool:
    """Whether lines that quotes would make parts of a text are rows like all others.

    They are if all their values of some column, labels say, are values of other lines, too, or
    class ids.
    """
    inside: list[set[str]] = [set() for _ in plain.header]
    for (line, _), row in plain._body():
        if line in spanned:
            for values, value in zip(inside, row, strict=False):
                values.add(value)
    if any(values and all(map(_CLASS_ID.fullmatch, values)) for values in inside):
        return True
    num = [len(values) for values in inside]
    for (line, _), row in plain._body():
        if line not in spanned:
            for values, value in zip(inside, row, strict=False):
                values.discard(value)
    return any(before and not left for before, left in zip(num, inside, strict=True))


def _is_blank(row: Sequence[str], header: Sequence[str] = ("", "")) -> bool:
    """Whether a record is an empty line; of one column, a quoted empty text is none."""
    return not row or (len(row) == 1 and len(header) > 1 and not row[0].strip())


def _holds(path: Path, wanted: str) -> bool:
    with open_text(path, "csv", "") as stream:
        return any(wanted in line for line in stream)


def _separator(path: Path, promised: str) -> tuple[str, int]:
    """What stands between the fields of the header, and the number of lines in front of it.

    Another separator than the promised one is believed if the promised one separates nothing.
    """
    with open_text(path, "tsv" if promised == "\t" else "csv") as stream:
        first = next((line for line in stream if line.strip()), "").rstrip("\n")
    if first.lower().startswith(_SEP_LINE) and first[len(_SEP_LINE) :] in SEPARATORS:
        return first[-1], 1
    if promised not in first:
        for other in sorted(SEPARATORS, key=first.count, reverse=True):
            if other in first:
                _, survey = _chosen(Delimited._in(path, other, "doubled", 0), promised=promised)
                if survey.is_whole and survey.num_rows:
                    return other, 0
    return promised, 0
