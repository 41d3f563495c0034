"""Files of fields between separators, in the dialects that people write: which one a file is in.

A file says nowhere how it was written. RFC 4180 doubles a quote inside quotes, others escape it by
a backslash or use single quotes, and GLUE, SST-2 or the SMS spam collection do not quote at all:
there a quote that begins a field is text, and reading it as RFC 4180 does swallows all rows up to
the next one. A dialect is believed if the whole file is well-formed in it, and no other one that
reads it whole says otherwise.
"""

from __future__ import annotations

import csv
import functools
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TextIO

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.opening import open_text

Quoting = Literal["doubled", "escaped", "single", "none"]
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_SEP_LINE = "sep="  # of which Excel takes the separator
_NUM_SHOWN = 40  # characters of a field, in a message
_SAID_OF: dict[Quoting, str] = {
    "doubled": "quotes stand around fields",
    "escaped": "backslashes stand in front of quotes inside fields",
    "single": "single quotes stand around fields",
    "none": "quotes are text",
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
        is_even: whether no row lacks a column that has a name, or has empty fields behind the last.
    """

    num_rows: int = 0
    problem: _Malformed | None = None
    is_even: bool = True

    @property
    def faults(self) -> int:
        """How badly a dialect explains the file: 0 is well, 2 not at all."""
        return 2 if self.problem else int(not self.is_even)


@dataclass(frozen=True, kw_only=True)
class Delimited:
    """A file with its dialect.

    Attributes:
        path: of the file.
        separator: one character.
        quoting: how a field holds separators and quotes.
        columns: their names, where the file has no header.
        num_skipped: lines in front of the header.
        notes: what a person is told of it.
    """

    path: Path
    separator: str
    quoting: Quoting = "doubled"
    columns: tuple[str, ...] | None = None
    num_skipped: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        path: Path,
        separator: str,
        *,
        quoting: Quoting | None = None,
        columns: tuple[str, ...] | None = None,
    ) -> Delimited:
        """Find out a file's dialect.

        Args:
            path: of the file.
            separator: that its extension promises.
            quoting: as a person says; None: find out.
            columns: as in the class.

        Raises:
            UserError: if it is well-formed in none, naming the line; or in two that differ.
        """
        base = _separated(cls(path=path, separator=separator, columns=columns), quoting)
        (chosen, survey), *others = _readings(base, quoting)
        if survey.problem is not None:
            asked = f" with --quoting {quoting}" if quoting else ""
            also = "name all columns with --columns, or " if columns else ""
            raise UserError(
                f"{path.name} cannot be read as {base._kind}{asked} (line {survey.problem.line}: "
                f"{survey.problem.reason}): {also}put quotes around texts that hold a "
                f"{SEPARATORS[base.separator]}, and double the quotes inside them"
            )
        notes = []
        if base.separator != separator:
            notes.append(f"fields are separated by a {SEPARATORS[base.separator]}")
        if quoting is None and chosen.quoting != "doubled":
            notes.append(f"read as with --quoting {chosen.quoting}: {_SAID_OF[chosen.quoting]}")
        plain = next((one for one, _ in others if one.quoting == "none"), None)
        if plain is not None and (line := _some_quotes(plain)):
            notes.append(
                f"quotes around some texts only (line {line}) are taken off; with --quoting none "
                "they are text"
            )
        return replace(chosen, notes=[f"{path.name}: {note}" for note in notes])

    @functools.cached_property
    def header(self) -> tuple[str, ...]:
        """Names of the columns, as written; none if a survey finds the header malformed."""
        if self.columns is not None:
            return self.columns
        try:
            return tuple(next((row for _, row in self._records() if not _is_blank(row)), []))
        except _Strict:
            return ()

    @property
    def _kind(self) -> str:
        return "tsv" if self.separator == "\t" else "csv"

    def rows(self, names: Sequence[str]) -> Iterator[list[str | None]]:
        """The fields of these columns, row by row; None where one is empty.

        Raises:
            UserError: if a column is there twice, or not in every row; or if a row is the header.
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
        for line, row in self._body():
            if len(row) > 1 and tuple(row) == self.header:
                raise UserError(
                    f"{self.path.name} has its header again in line {line}: delete that line"
                    + (", or leave --columns out" if self.columns else "")
                )
            if max(idxs) >= len(row):
                raise UserError(
                    f"{self.path.name} has {len(row)} field{'s' if len(row) > 1 else ''} in line "
                    f"{line}, and {len(self.header)} columns: write an empty field where there is "
                    "no value, or quotes around a text of several lines"
                )
            yield [row[idx] or None for idx in idxs]

    def _survey(self) -> _Survey:
        """Read the whole file."""
        num_rows, is_even, num_columns = 0, True, len(self.header)
        try:
            for line, row in self._body():
                num_rows += 1
                if any(row[num_columns:]):
                    counts = f"{num_columns} column{'s'[: num_columns - 1]} and {len(row)} fields"
                    return _Survey(problem=_Malformed(line=line, reason=counts))
                if len(row) > num_columns or any(self.header[len(row) :]):
                    is_even = False
        except _Strict as error:
            return _Survey(problem=_Malformed(line=error.line, reason=error.reason))
        return _Survey(num_rows=num_rows, is_even=is_even)

    def _body(self) -> Iterator[tuple[int, list[str]]]:
        """Rows behind the header with the first of their lines, without blank ones."""
        rows = ((line, row) for line, row in self._records() if not _is_blank(row, self.header))
        yield from itertools.islice(rows, 0 if self.columns else 1, None)

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Every record with the first of its lines."""
        newline = "\n" if self.quoting == "none" else ""
        with open_text(self.path, self._kind, newline) as stream:
            for _ in range(self.num_skipped):
                stream.readline()
            if self.quoting == "none":
                for number, line in enumerate(stream, self.num_skipped + 1):
                    text = line.rstrip("\r\n")
                    yield number, text.split(self.separator) if text else []
            else:
                yield from self._quoted(stream)

    def _quoted(self, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(sys.maxsize)  # its own limit is that of a careful parser
        is_escaped = self.quoting == "escaped"
        quote = "'" if self.quoting == "single" else '"'
        read = map(_hidden, stream) if is_escaped else stream
        reader = csv.reader(read, delimiter=self.separator, quotechar=quote, strict=True)
        while True:
            line = reader.line_num + self.num_skipped + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _Strict(line, _reason(error, self.separator)) from error
            yield line, [_shown(one) for one in row] if is_escaped else row


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


_Reading = tuple[Delimited, _Survey]


def _readings(base: Delimited, given: Quoting | None) -> list[_Reading]:
    """A file in the dialect that explains it best, then in others that say the same.

    Args:
        base: the file with its separator.
        given: the quoting that a person named.

    Raises:
        UserError: if two dialects read it with as few faults, and other documents.
    """
    read: list[_Reading] = []
    for quotings in [[given]] if given else _possible(base):
        found = [replace(base, quoting=one) for one in quotings]
        read += [(one, one._survey()) for one in found]
        if not all(survey.faults for _, survey in read):
            break
    fewest = min(survey.faults for _, survey in read)
    best = [reading for reading in read if reading[1].faults == fewest]
    if best[0][1].problem is not None:
        return best[:1]
    for other in best[1:]:
        _refuse_two(best[0], other)
    return best


def _possible(base: Delimited) -> list[list[Quoting]]:
    """Quotings that may be a file's, the usual one first; the later ones if no earlier will do.

    Single quotes are a writer's rather than the texts' if every line has them, or nothing else
    explains the file.
    """
    plain = replace(base, quoting="none")
    begins = {name[:1] for name in plain.header} if base.columns is None else set()
    if "'" in begins:
        return [["single"]]
    single = re.compile(rf"(^|{re.escape(base.separator)})'")
    has_quotes, has_escapes, ends, num_lines, num_single = False, False, set[str](), 0, 0
    with open_text(base.path, base._kind, "") as stream:
        for line in stream:
            has_quotes = has_quotes or '"' in line
            has_escapes = has_escapes or '\\"' in line
            ends.add(line[-1])
            num_lines += 1
            num_single += bool(single.search(line))
    usual: list[Quoting] = ["doubled"]
    if has_escapes:
        usual.append("escaped")
    # A carriage return among other line ends is text, too, where nothing is quoted.
    if (has_quotes or {"\r", "\n"} <= ends) and '"' not in begins:
        usual.append("none")
    if num_single >= num_lines - 1:
        return [[*usual, "single"]]
    return [usual, ["single"]] if num_single else [usual]


def _refuse_two(best: _Reading, other: _Reading) -> None:
    """Refuse a file that two dialects read, and other documents.

    They read the same if one takes quotes off whole fields, as it does by definition, or if one
    knows backslashes that stand outside of quotes.

    Raises:
        UserError: naming the first line where they differ, and what each reads there.
    """
    for mine, theirs in itertools.zip_longest(best[0]._body(), other[0]._body()):
        alike = None if theirs is None else theirs[1]
        own = None if mine is None else mine[1]
        if alike and best[0].quoting == "doubled" and other[0].quoting == "none":
            alike = [_bare(one) for one in alike]
        if own and best[0].quoting == "doubled" and other[0].quoting == "escaped":
            own = [_shown(_hidden(one)) for one in own]
        if own != alike:
            said = [
                f"{'nothing' if row is None else _shortened(row[1])} if {_SAID_OF[one.quoting]} "
                f"({survey.num_rows:,} documents, --quoting {one.quoting})"
                for row, (one, survey) in ((mine, best), (theirs, other))
            ]
            line = min(row[0] for row in (mine, theirs) if row is not None)
            raise UserError(
                f"{best[0].path.name} can be read in two ways, line {line} as {' or '.join(said)}: "
                "say which with --quoting"
            )


def _shortened(row: Sequence[str]) -> str:
    shown = " and ".join(repr(one) for one in row)
    return (
        shown if len(shown) <= 2 * _NUM_SHOWN else f"{shown[:_NUM_SHOWN]}...{shown[-_NUM_SHOWN:]}"
    )


_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def _bare(text: str) -> str:
    """A field without the quotes around it."""
    found = _QUOTED.fullmatch(text)
    return found[1].replace('""', '"') if found else text


def _some_quotes(plain: Delimited) -> int | None:
    """A line where a text has quotes around it, and others of its column have none."""
    lines: list[int] = [0] * len(plain.header)
    is_bare = [False] * len(plain.header)
    for line, row in plain._body():
        for idx, text in enumerate(row[: len(lines)]):
            if _QUOTED.fullmatch(text):
                lines[idx] = lines[idx] or line
            elif text:
                is_bare[idx] = True
    return next((line for line, bare in zip(lines, is_bare, strict=True) if line and bare), None)


def _is_blank(row: Sequence[str], header: Sequence[str] = ("", "")) -> bool:
    """Whether a record is an empty line; of one column, a quoted empty text is none."""
    return not row or (len(row) == 1 and len(header) > 1 and not row[0].strip())


def _separated(base: Delimited, quoting: Quoting | None) -> Delimited:
    """A file with what stands between its fields, without the line that says so.

    Another separator than the promised one is believed if the promised one separates nothing.
    """
    with open_text(base.path, base._kind) as stream:
        first = next((line for line in stream if line.strip()), "").rstrip("\n")
    if first.lower().startswith(_SEP_LINE) and first[len(_SEP_LINE) :] in SEPARATORS:
        return replace(base, separator=first[-1], num_skipped=1)
    if base.separator not in first:
        for other in sorted(SEPARATORS, key=first.count, reverse=True):
            if other in first:
                found = replace(base, separator=other)
                survey = _readings(found, quoting)[0][1]
                if not survey.faults and survey.num_rows:
                    return found
    return base
