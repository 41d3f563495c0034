"""JSON, Parquet, Arrow: what is asked for is read as it is, and nothing else matters."""

from __future__ import annotations

import datetime
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datasets import config as datasets_config
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data import tables
from tests.stages.data.reading import read

TEXTS = ["one", "two", "three"]
IDS = [1, 0, 1]
READ = [("one", "1"), ("two", "0"), ("three", "1")]


def lines(*entries: Any) -> str:
    return "\n".join(json.dumps(entry) for entry in entries)


def entries(**others: list[Any]) -> list[dict[str, Any]]:
    columns = {"text": TEXTS, "label": IDS, **others}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*entries())),
        ("a.ndjson", lines(*entries()) + "\n\n"),
        ("a.jsonl", "\ufeff" + lines(*entries()).replace("\n", "\r\n\r\n")),
        ("a.json", lines(*entries())),
        ("a.json", json.dumps(entries())),
        ("a.json", json.dumps(entries(), indent=1)),
        ("a.jsonl", json.dumps(entries())),
        ("a.json", json.dumps({"text": TEXTS, "label": IDS})),
        ("a.json", json.dumps({"text": TEXTS, "label": IDS}, indent=1)),
        # As pandas writes it unasked.
        ("a.json", json.dumps({"text": dict(enumerate(TEXTS)), "label": dict(enumerate(IDS))})),
        # Columns that nobody asks for.
        ("a.jsonl", lines(*entries(note=[None, None, "x"]))),
        ("a.jsonl", lines(*entries(note=[1, "x", {"a": [1]}]))),
        ("a.jsonl", lines(*entries(note=[10**30, 1, 2]))),
        ("a.jsonl", lines(entries()[0], *entries(extra=[1, 2, 3])[1:])),
    ],
)  # fmt: skip
def test_objects_however_they_are_written(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == READ


def test_a_column_that_is_null_for_long(tmp_path: Path) -> None:
    rows = [{"text": f"{i} {'word ' * 40}", "label": i % 2, "note": None} for i in range(30_000)]
    rows[-1]["note"] = "checked"
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    assert read(tmp_path / "a.jsonl") == [(one["text"], str(one["label"])) for one in rows]


def test_what_looks_like_a_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        lines({"text": "2020-01-01", "label": "a"}, {"text": "2021-01-01 10:00:00", "label": "b"})
    )
    assert read(tmp_path / "a.jsonl") == [("2020-01-01", "a"), ("2021-01-01 10:00:00", "b")]


@pytest.mark.parametrize(
    ("name", "content", "saying"),
    [
        ("a.jsonl", lines({"text": "a", "label": 1}, {"text": "b", "label": "x"}),
         "'label' holds an integer in a.jsonl, line 1 and text in a.jsonl, line 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "as jsonl .line 2"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2 is no object"),
        ("a.json", '["a", "b"]', "entry 1 of the list in a.json is no object"),
        ("a.json", json.dumps({"data": entries()}), "one object with the keys data"),
        ("a.jsonl", lines({"text": "a", "label": [0, 1]}), "multi-label"),
        ("a.jsonl", lines({"text": ["a"], "label": 0}), "'text' holds list"),
        ("a.jsonl", '{"text": "a\\ud800", "label": 1}\n{"text": "b", "label": 0}', "surrogates"),
    ],
)  # fmt: skip
def test_objects_that_are_refused(tmp_path: Path, name: str, content: str, saying: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=saying):
        read(tmp_path / name)


LAYOUTS: dict[str, Callable[[list[Any]], pa.Array]] = {
    "plain": pa.array,
    "large": lambda values: pa.array(values, pa.large_string()),
    "view": lambda values: pa.array(values, pa.string_view()),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
}


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, tuple[str, Callable[[pa.Table, Path], None]]] = {
    "parquet": ("a.parquet", pq.write_table),
    "file": ("a.arrow", write_file),
    "stream": ("b.arrow", write_stream),
    "feather": ("a.feather", lambda table, path: pyarrow.feather.write_feather(table, path)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_text_however_arrow_lays_it_out(tmp_path: Path, writer: str, layout: str) -> None:
    name, write = WRITERS[writer]
    others = {"v": pa.array(TEXTS, pa.string_view()), "l": pa.array([[1], [], None])}
    table = pa.table({"text": LAYOUTS[layout](TEXTS), "label": LAYOUTS[layout](["b", "a", "b"])})
    for other, values in others.items():
        if writer != "feather":  # whose compression knows no views
            table = table.append_column(other, values)
    write(table, tmp_path / name)
    assert read(tmp_path / name) == [("one", "b"), ("two", "a"), ("three", "b")]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1, 0, 1], pa.uint8()),
        pa.array([1, 0, 1], pa.decimal128(19, 0)),
        pa.array([1.0, 0.0, 1.0], pa.float32()),
        pa.array([True, False, True]),
        pa.array(["1.0", "0.0", "1"]),
    ],
)
def test_labels_of_every_number(tmp_path: Path, labels: pa.Array) -> None:
    pq.write_table(pa.table({"text": TEXTS, "label": labels}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == READ


def test_class_names_beside_columns_that_datasets_does_not_know(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": IDS}, features=features)
    kept = table.data.table.append_column("v", pa.array(TEXTS, pa.string_view()))
    pq.write_table(kept, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("one", "pos"), ("two", "neg"), ("three", "pos")]


def test_parts_of_a_split_may_differ_in_their_layout(tmp_path: Path) -> None:
    first = {"text": pa.array(TEXTS), "label": pa.array(IDS, pa.int8())}
    second = {
        "label": pa.array(IDS),
        "text": pa.array(TEXTS, pa.large_string()),
        "x": pa.array(IDS),
    }
    for number, columns in enumerate((first, second)):
        pq.write_table(pa.table(columns), tmp_path / f"train-{number:05}-of-00002.parquet")
    assert read(tmp_path) == READ * 2


def test_parts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for number, labels in enumerate((IDS, ["x", "y", "x"])):
        table = pa.table({"text": TEXTS, "label": labels})
        pq.write_table(table, tmp_path / f"train-{number:05}-of-00002.parquet")
    with pytest.raises(UserError, match=r"'label' holds int64 in .*00000.* and string in .*00001"):
        read(tmp_path)


def test_a_missing_part_is_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(UserError, match="'train' has 1 of 3 parts"):
        read(tmp_path)


def test_a_full_disk_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,0\n")
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "copies")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables.pa, "OSFile", full)
    with pytest.raises(UserError, match=r"copies/.* \(the disk is full\): .*HF_DATASETS_CACHE"):
        read(tmp_path / "a.csv")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*.part")] == []


VALUES = st.none() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.booleans() | st.text()
NESTED = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
)
ROW = st.fixed_dictionaries(
    {"text": st.text(st.characters(exclude_categories=["Cs"])) | st.none()},
    optional={"note": NESTED, "id": VALUES, "Label ": st.integers()},
)


@pytest.mark.parametrize("num", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_objects_are_read_as_they_are(tmp_path: Path, num: int) -> None:
    @settings(max_examples=num, database=None)
    @given(
        st.lists(ROW, min_size=2, max_size=6), st.sampled_from([".json", ".jsonl"]), st.booleans()
    )
    def check(rows: list[dict[str, Any]], extension: str, as_list: bool) -> None:
        rows = [{**row, "kind": number % 2} for number, row in enumerate(rows)]
        content = json.dumps(rows) if as_list else lines(*rows)
        path = tmp_path / f"a{extension}"
        path.write_text(content)
        if all(row["text"] is None for row in rows):
            return  # of which nothing tells that they are texts
        assert read(path, label_column="kind") == [
            (row["text"] or "", str(row["kind"])) for row in rows
        ]

    check()


COLUMNS = st.sampled_from(
    [
        pa.array([1, None, 3]),
        pa.array([[1], None, [2, 3]]),
        pa.array([{"a": 1}, {"a": None}, None]),
        pa.array([None, None, None]),
        pa.array([datetime.date(2020, 1, 1), None, None]),
        pa.array(["x", "y", None], pa.string_view()),
        pa.array([b"x", b"y", None]),
        pa.array(["x", "y", "x"]).dictionary_encode(),
        pa.array([1.5, float("nan"), None]),
    ]
)


@pytest.mark.parametrize("num", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_any_other_columns_of_arrow_are_left_alone(tmp_path: Path, num: int) -> None:
    @settings(max_examples=num, database=None)
    @given(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"])) | st.none(), min_size=3, max_size=3
        ),
        st.sampled_from(sorted(LAYOUTS)),
        st.dictionaries(st.sampled_from(["id", "note", "", "a.b"]), COLUMNS),
        st.sampled_from(["parquet", "file", "stream"]),
    )
    def check(texts: list[Any], layout: str, others: dict[str, pa.Array], writer: str) -> None:
        texts = [*texts[:2], "never null"]
        name, write = WRITERS[writer]
        columns = {**others, "text": LAYOUTS[layout](texts), "label": pa.array(IDS)}
        write(pa.table(columns), tmp_path / name)
        assert read(tmp_path / name) == [
            (text or "", str(label)) for text, label in zip(texts, IDS, strict=True)
        ]

    check()
