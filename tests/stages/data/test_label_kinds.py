"""Labels of which a document has any number, and labels that are numbers, as sources write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.label_kinds import (
    LabelSets,
    are_fractions,
    are_sets,
    read_label_sets,
    read_label_values,
)
from teacher_cache.stages.heads import HEADS, head_of_labels, possible_heads

ID2LABEL = {0: "rude", 1: "toxic", 2: "kind"}
SINGLE, MULTI, NUMBER = HEADS


def read(columns: Mapping[str, Sequence[Any]], **given: Any) -> LabelSets:
    table = pa.table(dict(columns))
    features = datasets.Features.from_arrow_schema(table.schema)
    return read_label_sets(table, features, list(columns), given.get("label_names"))


def of_teacher(labels: LabelSets, label_map: Sequence[str] | None = None) -> list[list[int]]:
    return labels.of_classes(ID2LABEL, None, label_map)[0].has.tolist()


@pytest.mark.parametrize(
    "written",
    [
        [["toxic", "rude"], [], ["kind"]],
        ['["toxic", "rude"]', "[]", '["kind"]'],
        ["['toxic', 'rude']", "[]", "['kind']"],
        [[1, 0], [], [2]],
        ["[1, 0]", "[]", "[2]"],
    ],
)
def test_lists_of_names_or_ids(written: list[Any]) -> None:
    assert of_teacher(read({"labels": written})) == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("kind", [int, str, bool, float])
def test_columns_of_zero_and_one(kind: type) -> None:
    written = {"toxic": [1, 0, 0], "rude": [1, 0, 0], "kind": [0, 0, 1]}
    labels = read({name: [kind(one) for one in column] for name, column in written.items()})
    assert of_teacher(labels) == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert labels.counts() == {"toxic": 1, "rude": 1, "kind": 1}


def test_a_class_feature_of_lists_brings_its_names() -> None:
    features = datasets.Features(
        {"labels": datasets.List(datasets.ClassLabel(names=["toxic", "kind", "rude"]))}
    )
    table = datasets.Dataset.from_dict({"labels": [[0, 2], [1]]}, features=features)
    labels = read_label_sets(table.data.table, table.features, ["labels"], None)
    assert of_teacher(labels) == [[1, 1, 0], [0, 0, 1]]


def test_what_is_not_known_is_missing_and_an_empty_list_is_not() -> None:
    assert read({"l": [["a"], None, []]}).is_missing.tolist() == [False, True, False]
    columns = read({"a": [1, None, 0, -1], "b": [0, 1, 0, 1]})
    assert columns.is_missing.tolist() == [False, True, False, True]
    assert columns.of_document(0) == (1, 0) and columns.of_document(1) is None


def test_the_map_says_which_label_is_which() -> None:
    labels = read({"a": [1, 0], "b": [0, 1], "c": [1, 1]})
    assert of_teacher(labels, ["a=kind", "b=toxic", "c=0"]) == [[1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("columns", "saying"),
    [
        ({"l": ["toxic", "kind"]}, "one label a document .such as 'toxic'., and a multi-label"),
        ({"l": [1, 0]}, "holds one label a document .such as 1."),
        ({"l": ["[toxic, rude]", "[]"]}, "expected a list of names or integers"),
        ({"l": [[0.5], []]}, "expected a list of names or integers"),
        ({"l": [[], []]}, "hold no label, expected names, or integers"),
        ({"a": [1, 2], "b": [0, 1]}, "column 'a' holds '2', expected 0 or 1"),
        ({"a": ["x", "1"], "b": ["0", "1"]}, "column 'a' holds 'x', expected 0 or 1"),
    ],
)
def test_other_labels_get_their_sentence(columns: dict[str, list[Any]], saying: str) -> None:
    with pytest.raises(UserError, match=saying):
        read(columns)


def test_a_label_outside_the_head_is_refused() -> None:
    with pytest.raises(UserError, match="the label mean of the corpus is none of the teacher's"):
        of_teacher(read({"l": [["toxic", "mean"], []]}))
    with pytest.raises(UserError, match="the corpus has the label 3, and the teacher has 3"):
        of_teacher(read({"l": [[0, 3], []]}))
    with pytest.raises(UserError, match="label 'kind', of which none of the columns toxic, rude"):
        of_teacher(read({"toxic": [1, 0], "rude": [0, 1]}))
    with pytest.raises(UserError, match="the label 'b' in column 'l' is not among the label names"):
        read({"l": [["a", "b"]]}, label_names=("a", "c"))


def test_how_labels_are_written_tells_the_kind_where_the_teacher_does_not() -> None:
    def kind(heads: Sequence[str], **columns: list[Any]) -> str:
        return head_of_labels(heads, pa.table(columns), list(columns)).name

    both = (SINGLE, MULTI)
    assert kind(both, l=[["a"], []]) == kind(both, a=[0, 1], b=[1, 0]) == MULTI
    assert kind(both, l=["a", "b"]) == kind(both, l=[0, 1]) == kind(both, l=[0.5, 1.0]) == SINGLE
    assert kind((SINGLE, MULTI, NUMBER), l=[0.5, 1.0]) == NUMBER
    assert kind((SINGLE, MULTI, NUMBER), l=["0.5", "1"]) == NUMBER
    assert kind((NUMBER,), l=[0, 1]) == NUMBER
    assert not are_sets(pa.table({"l": ["[sic] a", "b"]}), ["l"])
    assert not are_fractions(pa.table({"l": [1.0, None]}), ["l"])


@pytest.mark.parametrize(
    ("problem_type", "num", "expected"),
    [
        (None, 3, (SINGLE, MULTI)),
        (None, 1, (NUMBER,)),
        (SINGLE, 2, (SINGLE,)),
        (MULTI, 1, (MULTI,)),
        (NUMBER, 1, (NUMBER,)),
    ],
)
def test_a_configuration_says_the_kind(
    problem_type: str | None, num: int, expected: tuple[str, ...]
) -> None:
    assert possible_heads("it", problem_type, num) == expected


@pytest.mark.parametrize(
    ("problem_type", "num", "saying"),
    [
        (NUMBER, 3, "it gives 3 numbers a document and its problem_type is regression"),
        (SINGLE, 1, "it gives one number a document and its problem_type is single_label"),
        ("ordinal", 5, "its problem_type is ordinal, which is not served"),
    ],
)
def test_a_kind_that_is_not_served_is_refused_by_name(
    problem_type: str, num: int, saying: str
) -> None:
    with pytest.raises(UserError, match=saying):
        possible_heads("it", problem_type, num)


def numbers(written: list[Any]) -> np.ndarray:
    table = pa.table({"l": written})
    features = datasets.Features.from_arrow_schema(table.schema)
    return read_label_values(table, features, ["l"]).values


@pytest.mark.parametrize(
    "written", [[2.5, -1.0, None], ["2.5", "-1", ""], ["2.5", " -1.0", "nan"], [2.5, -1, None]]
)
def test_numbers_of_which_minus_one_is_one(written: list[Any]) -> None:
    np.testing.assert_array_equal(numbers(written), [2.5, -1.0, np.nan])


@pytest.mark.parametrize(
    ("written", "saying"),
    [
        (["good", "bad"], "holds string such as 'good', and this teacher gives a number"),
        ([[1.0], [2.0]], "holds list<.*and this teacher gives a number"),
        ([True, False], "holds bool such as True"),
        ([1.0, float("inf")], "holds an infinite number"),
    ],
)
def test_what_is_no_number_gets_its_sentence(written: list[Any], saying: str) -> None:
    with pytest.raises(UserError, match=saying):
        numbers(written)


def test_numbers_are_of_no_class() -> None:
    labels = read_label_values(
        pa.table({"l": [0.5, 1.5]}), datasets.Features({"l": datasets.Value("float64")}), ["l"]
    )
    assert labels.of_classes({0: "LABEL_0"}, None, None) == (labels, {})
    with pytest.raises(UserError, match="--label-map is of classes, and this teacher gives a"):
        labels.of_classes({0: "LABEL_0"}, None, ["a=0"])
    assert labels.constant() is None and labels.at(np.array([1])).constant() == "1.5"
