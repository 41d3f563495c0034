"""Files of one kind as one table of the columns that are asked for, and of no others.

A reader says which columns there are, then gives the wanted ones batch by batch. Texts and labels
are kept as they are written: what is not asked for is not typed, so it cannot spoil the rest. The
Arrow copy goes to the cache of `datasets`, in a folder named by the content's hash; nothing is ever
written beside a source.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import config as datasets_config

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.delimited import Delimited, Quoting
from teacher_cache.stages.data.opening import (
    LONGEST_BEGIN,
    SourceUnavailable,
    foreign,
    open_text,
    root_cause,
    unreadable,
)

TxtUnit = Literal["line", "paragraph", "document"]
FROM_FIRST_LINE = b"from_first_line"  # of a schema's metadata: its names may be a document
_ROWS = 1000  # of a batch
_CHARACTERS = 10 << 20  # of a text file, read at a time
_VERSION = "2"  # of how files are read: copies of another one are not used


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a person says of how files are written.

    Attributes:
        txt_unit: what of a text file is a document.
        quoting: of csv and tsv; None: find out.
        columns: of csv and tsv without a header, their names; None: there is one.
    """

    txt_unit: TxtUnit = "line"
    quoting: Quoting | None = None
    columns: tuple[str, ...] | None = None

    @property
    def given(self) -> dict[str, str]:
        """By name, what is not left as it is."""
        unit = None if self.txt_unit == "line" else self.txt_unit
        columns = None if self.columns is None else ",".join(self.columns)
        found = {"txt_unit": unit, "quoting": self.quoting, "columns": columns}
        return {name: value for name, value in found.items() if value is not None}


class Table(ABC):
    """Files of one kind, one behind the other.

    Attributes:
        files: in the order of their rows.
        notes: what a person is told of how they are read.
    """

    heeds: ClassVar[tuple[str, ...]] = ()  # of `Format`

    def __init__(self, files: Sequence[Path], kind: str, written: Format):
        self.files = files
        self.kind = kind
        self.written = written
        self.notes: list[str] = []

    @property
    def given(self) -> dict[str, str]:
        """Of what a person says of the files, what decides how these are read."""
        return {name: value for name, value in self.written.given.items() if name in self.heeds}

    @functools.cached_property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """All columns, those of one name included, and their types.

        Raises:
            UserError: if a file cannot be read as what it is called.
        """

    @abstractmethod
    def columns(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """The values of these columns, `_ROWS` rows or so at a time; arrays or lists.

        Raises:
            UserError: as `schema`, or if a file lacks one of them.
        """

    def field(self, name: str) -> tuple[datasets.Features, pa.DataType]:
        """How a column is kept, and the type that it has there."""
        kept = plain_type(self.schema.field(name).type)
        own = _own_features(self.schema).get(name)
        features = datasets.Features({name: own if own is not None else _feature(kept)})
        return features, features.arrow_schema.field(name).type

    def read(self, names: Sequence[str], content_sha256: str) -> datasets.Dataset:
        """These columns, from the disk.

        Args:
            names: of the columns.
            content_sha256: of the files.

        Raises:
            SourceUnavailable: if there are no rows.
            UserError: if a file cannot be read, or the disk of the copy is full.
        """
        features = datasets.Features()
        for name in names:
            features |= self.field(name)[0]
        schema = features.arrow_schema
        how = [self.kind, self.given, list(names), str(schema)]
        key = json.dumps([_VERSION, datasets.__version__, *how])
        folder = Path(datasets_config.HF_DATASETS_CACHE) / "teacher_cache" / content_sha256[:16]
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
        if not path.exists():
            _write(path, schema, self._batches(names, schema))
        table = cast(datasets.Dataset, datasets.Dataset.from_file(str(path)))
        if not len(table):
            raise SourceUnavailable(f"{self.named} holds no documents: give a file with some in it")
        return table

    @property
    def named(self) -> str:
        """The files, in a message."""
        names = ", ".join(path.name for path in self.files[:3])
        return names + (", ..." if len(self.files) > 3 else "")

    def _batches(self, names: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for columns in self.columns(names):
            arrays = [
                _as(values, field.type, field.name, self.named)
                for values, field in zip(columns, schema, strict=True)
            ]
            yield from pa.Table.from_arrays(arrays, schema=schema).to_batches()


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type of the values, however they are laid out: views, dictionaries, extensions."""
    if isinstance(found, pa.BaseExtensionType):
        return plain_type(found.storage_type)
    if pa.types.is_dictionary(found) or pa.types.is_run_end_encoded(found):
        return plain_type(found.value_type)
    if pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return pa.string()
    return found


def _feature(found: pa.DataType) -> Any:
    """A feature of `datasets`; of a type that it does not know, text that says what it is."""
    try:
        return datasets.Features.from_arrow_schema(pa.schema({"one": found}))["one"]
    # `datasets` has no feature of its own for some types: ValueError for an interval or a union,
    # and for nested ones whatever building their parts raises. The column is shown as text.
    except (ValueError, TypeError, NotImplementedError):
        return datasets.Value("string")


def _own_features(schema: pa.Schema) -> datasets.Features:
    """The class features that `datasets` wrote beside the schema."""
    written = (schema.metadata or {}).get(b"huggingface")
    found = (json.loads(written).get("info") or {}).get("features") if written else None
    classes = {
        name: one
        for name, one in (found or {}).items()
        if isinstance(one, dict) and one.get("_type") == "ClassLabel"
    }
    return datasets.Features.from_dict(classes)


def _as(values: Any, wanted: pa.DataType, name: str, where: str) -> Any:
    """One column of a batch in the type that it is kept in."""
    try:
        if not isinstance(values, pa.Array | pa.ChunkedArray):
            return pa.array(values, wanted)
        if isinstance(values.type, pa.BaseExtensionType):
            values = pc.cast(values, values.type.storage_type)
        if pa.types.is_run_end_encoded(values.type):
            values = pc.run_end_decode(values)  # pyright: ignore[reportAttributeAccessIssue]
        if pa.types.is_dictionary(values.type):
            values = pc.cast(values, values.type.value_type)
        return pc.cast(values, wanted)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"the column {name!r} of {where} cannot be read as {wanted} ({root_cause(error)}): "
            "write it anew, or name another column"
        ) from error


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a copy, through a file that is renamed once it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        part.replace(path)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"a copy of the data cannot be written to {path.parent} "
            f"({'the disk is full' if is_full else error.strerror or error}): "
            f"{'free some of it' if is_full else 'check its permissions'}, or name a folder on "
            "another disk with the environment variable HF_DATASETS_CACHE"
        ) from error
    finally:
        part.unlink(missing_ok=True)


class Delimiteds(Table):
    """csv and tsv; every field is text: `NA` stays one, `007` too."""

    heeds = ("quoting", "columns")

    @functools.cached_property
    def _delimited(self) -> list[Delimited]:
        separator = "\t" if self.kind == ".tsv" else ","
        how = self.written
        found = [
            Delimited.of(path, separator, quoting=how.quoting, columns=how.columns)
            for path in self.files
        ]
        for one in found:
            self.notes += one.notes
        return found

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of the first file; where its first line names them, that is said beside."""
        read = None if self.written.columns else {FROM_FIRST_LINE: b""}
        return pa.schema([(name, pa.string()) for name in self._delimited[0].header], read)

    def columns(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Fields; an empty one is none."""
        for one in self._delimited:
            yield from _columns(one.rows(names), len(names))


def _columns(rows: Iterable[Sequence[Any]], num: int) -> Iterator[list[list[Any]]]:
    columns: list[list[Any]] = [[] for _ in range(num)]
    num_characters = 0
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
            num_characters += len(value) if isinstance(value, str) else 0
        if len(columns[0]) == _ROWS or num_characters > _CHARACTERS:
            yield columns
            columns, num_characters = [[] for _ in range(num)], 0
    yield columns


class JsonObjects(Table):
    """Objects of JSON: one a line, a list of them, or an object of columns.

    By `json`, since what reads into Arrow takes texts for dates, and types what nobody asked for.
    """

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Every key of any object; the type of what stands there, null of what never does."""
        return pa.schema({name: _json_type(seen) for name, seen in self._seen.items()})

    @functools.cached_property
    def _seen(self) -> dict[str, dict[type, tuple[str, Any]]]:
        """By key and Python's type, where the first value of it stands, and the value."""
        seen: dict[str, dict[type, tuple[str, Any]]] = {}
        for path in self.files:
            for where, entry in _json_entries(path, self.kind):
                for name, value in entry.items():
                    seen.setdefault(name, {}).setdefault(type(value), (where, value))
        return seen

    def field(self, name: str) -> tuple[datasets.Features, pa.DataType]:
        """Lists and objects are kept as JSON: those of two rows need not be of one type."""
        if {list, dict} & self._seen[name].keys():
            features = datasets.Features({name: datasets.Value("string")})
            return features, features.arrow_schema.field(name).type
        return super().field(name)

    def columns(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Values as written, lists and objects as JSON; None where an object has none."""
        for name in names:
            kinds = {kind: at for kind, at in self._seen[name].items() if kind is not type(None)}
            if len(kinds) > 1 and set(kinds) != {int, float}:
                listed = " and ".join(
                    f"{_JSON_NAMES[kind]} in {where}" for kind, (where, _) in kinds.items()
                )
                raise UserError(f"the column {name!r} holds {listed}: write all its values alike")
        for path in self.files:
            rows = (
                [_flat(entry.get(name)) for name in names]
                for _, entry in _json_entries(path, self.kind)
            )
            yield from _columns(rows, len(names))


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


_JSON_NAMES: dict[type, str] = {
    str: "text",
    int: "an integer",
    float: "a fraction",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _json_type(seen: dict[type, tuple[str, Any]]) -> pa.DataType:
    values = [value for kind, (_, value) in seen.items() if kind is not type(None)]
    if {type(value) for value in values} == {int, float}:
        return pa.float64()
    try:
        return pa.array(values[:1]).type
    except (pa.ArrowException, OverflowError, UnicodeError):
        if isinstance(values[0], list | dict):
            return pa.list_(pa.null())
        return pa.string() if isinstance(values[0], str) else pa.float64()


def _json_entries(path: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects with the place where each stands.

    Raises:
        UserError: naming the line that is no object.
    """
    with open_text(path, kind) as stream:
        begin = stream.read(1)
        while begin.isspace():
            begin = stream.read(1)
    with open_text(path, kind) as stream:
        if begin == "[":
            yield from _entries_of_list(path, _whole(path, kind, stream))
            return
        num = 0
        for num_line, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                if num == 0 and kind == ".json":
                    break  # an object over several lines
                raise unreadable(path, kind, f"line {num_line}: {error}") from error
            if not isinstance(entry, dict):
                raise unreadable(path, kind, f"line {num_line} is no object")
            if num == 0 and kind == ".json" and _are_columns(entry):
                break
            num += 1
            yield f"{path.name}, line {num_line}", entry
        else:
            return
    with open_text(path, kind) as stream:
        yield from _entries_of_object(path, kind, _whole(path, kind, stream))


def _whole(path: Path, kind: str, stream: Any) -> Any:
    try:
        return json.load(stream)
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise unreadable(path, kind, str(error)) from error


def _entries_of_list(path: Path, found: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, dict):
            raise UserError(
                f"entry {number} of the list in {path.name} is no object: write one with the "
                'text, as in {"text": "..."}'
            )
        yield f"{path.name}, entry {number}", entry


def _are_columns(found: dict[str, Any]) -> bool:
    """Whether an object holds columns: lists, or objects by row as pandas writes them."""
    values = list(found.values())
    kinds = {type(value) for value in values}
    return kinds in ({list}, {dict}) and len({len(value) for value in values}) == 1


def _entries_of_object(
    path: Path, kind: str, found: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if not _are_columns(found) or any(
        isinstance(one, dict)
        for value in found.values()
        if isinstance(value, list)
        for one in value
    ):
        raise unreadable(
            path,
            kind,
            f"it is one object with the keys {', '.join(found)}, expected one a document",
            "write the list of documents alone, or an object a line",
        )
    columns = [v if isinstance(v, list) else list(v.values()) for v in found.values()]
    if any(
        isinstance(v, dict) and v.keys() != next(iter(found.values())).keys()
        for v in found.values()
    ):
        raise unreadable(path, kind, "its columns have other rows")
    for number, row in enumerate(zip(*columns, strict=True), 1):
        yield f"{path.name}, entry {number}", dict(zip(found, row, strict=True))


class Arrows(Table):
    """Parquet and Arrow files, typed as they are."""

    @functools.cached_property
    def _schemas(self) -> list[pa.Schema]:
        return [self._opened(path)[0] for path in self.files]

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of the first file; a column's type is one that serves all of them."""
        first = self._schemas[0]
        fields = [
            field.with_type(self._common(field)) if len(self.files) > 1 else field
            for field in first
        ]
        return pa.schema(fields, first.metadata)

    def _common(self, field: pa.Field) -> pa.DataType:
        """What holds all files' values; the first's where there is no such type."""
        types = [
            pa.field(field.name, plain_type(schema.field(field.name).type))
            for schema in self._schemas
            if schema.names.count(field.name) == 1
        ]
        try:
            unified = pa.unify_schemas(
                [pa.schema([one]) for one in types], promote_options="permissive"
            )
            return unified.field(0).type
        except (pa.ArrowException, IndexError):
            return field.type

    def columns(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Arrays."""
        for path, schema in zip(self.files, self._schemas, strict=True):
            for name in names:
                if schema.names.count(name) != 1:
                    raise UserError(
                        f"{path.name} has {schema.names.count(name)} columns {name!r} (its columns "
                        f"are {', '.join(schema.names)}): write all files with the same ones"
                    )
                theirs, ours = plain_type(schema.field(name).type), self.field(name)[1]
                if pa.types.is_string(ours) != pa.types.is_string(theirs) and not pa.types.is_null(
                    theirs
                ):
                    raise UserError(
                        f"the column {name!r} holds {ours} in {self.files[0].name} and {theirs} in "
                        f"{path.name}: write both alike"
                    )
            try:
                for batch in self._opened(path)[1](names):
                    yield [batch.column(name) for name in names]
            except (pa.ArrowException, OSError) as error:
                raise unreadable(path, self.kind, root_cause(error)) from error

    def _opened(self, path: Path) -> tuple[pa.Schema, Any]:
        """A file's schema, and what gives batches of some of its columns."""
        try:
            if self.kind == ".parquet":
                file = pq.ParquetFile(path)
                return file.schema_arrow, lambda names: file.iter_batches(
                    _ROWS, columns=list(names)
                )
            source = pa.memory_map(str(path))
            try:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = reader = pa.ipc.open_stream(source)
            return reader.schema, lambda names: (batch.select(list(names)) for batch in batches)
        except (pa.ArrowException, OSError) as error:
            with path.open("rb") as stream:
                instead = foreign(stream.read(LONGEST_BEGIN))
            if instead is None or instead.endswith(self.kind):
                raise unreadable(path, self.kind, root_cause(error)) from error
            raise UserError(
                f"{path.name} is no {self.kind.lstrip('.')}: it is {instead}"
            ) from error


class Texts(Table):
    """Plain text: one column, whose rows are lines, paragraphs or whole files."""

    heeds = ("txt_unit",)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """The texts alone."""
        return pa.schema({"text": pa.string()})

    def columns(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Without line ends; paragraphs stand between empty lines."""
        for path in self.files:
            with open_text(path, ".txt") as stream:
                yield from _columns(([text] for text in self._units(stream)), 1)

    def _units(self, stream: Any) -> Iterator[str]:
        if self.written.txt_unit == "line":
            yield from (line.rstrip("\n") for line in stream)
        elif self.written.txt_unit == "document":
            yield stream.read()
        else:
            rest = ""
            while read := stream.read(_CHARACTERS):
                *whole, rest = (rest + read + stream.readline()).split("\n\n")
                yield from filter(None, whole)
            if rest:
                yield rest


def table_of(files: Sequence[Path], kind: str, written: Format) -> Table:
    """What reads files of this kind.

    Raises:
        SourceUnavailable: if one is empty.
    """
    for path in files:
        if path.stat().st_size == 0:
            raise SourceUnavailable(f"{path.name} is empty: give a file with documents in it")
    return _TABLES[kind](files, kind, written)


_TABLES: dict[str, type[Table]] = {
    ".csv": Delimiteds,
    ".tsv": Delimiteds,
    ".json": JsonObjects,
    ".jsonl": JsonObjects,
    ".ndjson": JsonObjects,
    ".parquet": Arrows,
    ".arrow": Arrows,
    ".feather": Arrows,
    ".txt": Texts,
}
TABULAR = tuple(_TABLES)
