from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.labels import Labels, read_labels, settle_missing


def _read(
    values: list[object], names: tuple[str, ...] | None = None, feature: object = None
) -> Labels:
    features = datasets.Features({"label": feature}) if feature is not None else None
    table = datasets.Dataset.from_dict({"label": values}, features=features)
    found = read_labels(table.data.table, table.features, "label", names)
    labels, _ = settle_missing(found, "refuse", "label", len(values))
    assert labels is not None
    return labels


@pytest.mark.parametrize("values", [[1, 0, 2], [1.0, 0.0, 2.0], ["1", "0", "2"], [" 1", "0 ", "2"]])
def test_integers_however_they_are_written(values):
    labels = _read(values)
    assert labels.ids.tolist() == [1, 0, 2]
    assert labels.ids.dtype == np.int64
    assert labels.names is None
    assert labels.counts() == {"0": 1, "1": 1, "2": 1}


@pytest.mark.parametrize("values", [[True, False, None], ["TRUE", "false", ""]])
def test_truths_are_ids_however_they_are_written(values):
    given = [value for value in values if value not in (None, "")]
    assert _read(given).ids.tolist() == [1, 0]
    labels = _read(given, ("neg", "pos"))
    assert (labels.ids.tolist(), labels.names) == ([1, 0], ("neg", "pos"))
    # Names that say which is which decide, whatever their order.
    assert _read(given, ("True", "False")).counts() == {"True": 1, "False": 1}
    assert _read(given, ("True", "False")).ids.tolist() == [0, 1]
    with pytest.raises(UserError, match="1 of 3 documents have no label"):
        _read(values)


@pytest.mark.parametrize("nothing", ["nan", "NaN", "<NA>", "None", "null", "N/A"])
def test_what_pandas_writes_for_nothing_is_no_number(nothing):
    with pytest.raises(UserError, match="1 of 3 documents have no label"):
        _read(["1", "0.0", nothing])


def test_a_word_for_nothing_may_be_a_class():
    assert _read(["favor", "none", "against"]).names == ("against", "favor", "none")
    with pytest.raises(UserError, match="1 of 3 documents have no label"):
        _read(["favor", "nan", "against"])


@pytest.mark.parametrize("values", [[-1, 0, 1], ["-1", "0", "1"]])
def test_a_number_for_nothing_is_a_class_that_the_map_names(values):
    table = pa.table({"label": values})
    features = datasets.Features.from_arrow_schema(table.schema)
    with pytest.raises(UserError, match="null or -1, unless --label-map names it"):
        settle_missing(read_labels(table, features, "label"), "refuse", "label", 3)
    given = ("-1=bad", "0=fair", "1=good")
    labels = read_labels(table, features, "label", label_map=given)
    mapped, _ = labels.of_classes({0: "good", 1: "fair", 2: "bad"}, None, given)
    assert mapped.ids.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "values", [["a|b", "b|c", "d"], ["a;b", "c", "a"], ["a, b", "a", "b"], ["[a]", "b", "b"]]
)
def test_several_labels_in_one_are_refused(values):
    with pytest.raises(UserError, match="several labels a document"):
        _read(values)


def test_names_that_hold_separators_are_names():
    names: list[object] = ["Albany, NY", "Troy, NY", "Sci/Tech", "either|or"]
    assert _read(names).counts() == dict.fromkeys(names, 1)


def test_names_are_sorted_without_an_order_given():
    labels = _read(["pos", "neg", " pos "])
    assert (labels.names, labels.names_are_ordered) == (("neg", "pos"), False)
    assert labels.ids.tolist() == [1, 0, 1]
    assert labels.counts() == {"neg": 1, "pos": 2}


def test_names_take_the_order_given():
    labels = _read(["pos", "neg"], ("pos", "neg", "neutral"))
    assert (labels.names, labels.names_are_ordered) == (("pos", "neg", "neutral"), True)
    assert labels.ids.tolist() == [0, 1]


def test_a_class_feature_brings_names_and_order():
    labels = _read([1, 0, 1], feature=datasets.ClassLabel(names=["neg", "pos"]))
    assert (labels.names, labels.names_are_ordered) == (("neg", "pos"), True)
    assert labels.ids.tolist() == [1, 0, 1]


def test_a_class_feature_takes_another_order():
    feature = datasets.ClassLabel(names=["neg", "pos"])
    assert _read([1, 0], ("pos", "neg"), feature).ids.tolist() == [0, 1]
    with pytest.raises(UserError, match="given are bad, good, and the data set's are neg, pos"):
        _read([1, 0], ("bad", "good"), feature)


def test_integers_take_names():
    assert _read([1, 0], ("bad", "good")).counts() == {"bad": 1, "good": 1}
    with pytest.raises(UserError, match="integers 0 to 2, and 2 label names were given"):
        _read([0, 2], ("bad", "good"))


@pytest.mark.parametrize(
    "values",
    [[1, None, 0, -1], [1.0, None, 0.0, None], ["a", None, "b", " "], ["1", "", "0", "-1"]],
)
def test_missing_labels_are_counted(values):
    with pytest.raises(UserError, match=r"2 of 4 documents have no label .* --unlabeled"):
        _read(values)


def test_missing_labels_of_a_class_feature_are_counted():
    with pytest.raises(UserError, match="1 of 2 documents have no label"):
        _read([-1, 1], feature=datasets.ClassLabel(names=["neg", "pos"]))


def test_a_column_of_nothing():
    with pytest.raises(UserError, match="2 of 2 documents have no label"):
        _read([None, None])


@pytest.mark.parametrize(("values", "name"), [([1, 1, 1], "1"), (["pos"] * 3, "pos")])
def test_one_class_only_is_named_with_its_count(values, name):
    with pytest.raises(UserError, match=f"all 3 documents have the label '{name}'"):
        _read(values)


def test_a_name_outside_those_given_is_named():
    with pytest.raises(UserError, match=r"label 'pso' .* \(neg, pos\): did you mean 'pos'"):
        _read(["neg", "pso"], ("neg", "pos"))


@pytest.mark.parametrize(
    ("values", "message"), [([0.5, 1.0], "fractions such as 0.5"), ([[0], [1]], "holds list<")]
)
def test_columns_that_are_no_labels(values, message):
    with pytest.raises(UserError, match=message):
        _read(values)


def test_a_column_in_several_chunks():
    table = pa.table({"label": pa.chunked_array([["b", "a"], ["c", "a"]])})
    features = datasets.Features({"label": datasets.Value("string")})
    labels = read_labels(table, features, "label", None)
    assert labels.ids.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("values", [["0.0", "1.0", "2."], ["+0", "1", " 2.00 "]])
def test_integers_that_were_floats(values):
    assert _read(values).ids.tolist() == [0, 1, 2]


def test_fractions_written_as_text_are_no_classes():
    with pytest.raises(UserError, match=r"fractions such as 0\.5"):
        _read(["0.5", "1"])


def test_names_that_differ_in_their_spelling_alone_make_no_teacher():
    with pytest.raises(UserError, match="'Spam' and 'spam' differ in their spelling alone"):
        _read(["Spam", "spam", "ham"]).class_names()
    assert _read(["SPAM", "ham"], ("ham", "spam")).ids.tolist() == [1, 0]


@pytest.mark.parametrize(
    "values",
    [[1, None, 0, -1], [1.0, float("nan"), 0.0, None], ["a", None, "b", " "], ["1", "", "0", "-1"]],
)
def test_missing_labels_are_dropped_or_kept(values):
    table = datasets.Dataset.from_dict({"label": values})
    labels = read_labels(table.data.table, table.features, "label", None)
    dropped, kept = settle_missing(labels, "drop", "label", 4)
    assert kept.tolist() == [True, False, True, False]
    assert dropped is not None and sum(dropped.counts().values()) == 2
    unlabeled, kept = settle_missing(labels, "unlabeled", "label", 4)
    assert kept.all() and unlabeled is not None
    assert unlabeled.is_missing.tolist() == [False, True, False, True]


def test_labels_that_are_all_missing():
    table = datasets.Dataset.from_dict({"label": [None, -1]})
    labels = read_labels(table.data.table, table.features, "label", None)
    assert settle_missing(labels, "unlabeled", "label", 2)[0] is None
    with pytest.raises(UserError, match="2 of 2 documents have no label"):
        settle_missing(labels, "drop", "label", 2)


def test_integers_of_any_size_are_read_or_refused():
    table = pa.table({"label": pa.array([2**63 + 1, 0], pa.uint64())})
    features = datasets.Features({"label": datasets.Value("uint64")})
    with pytest.raises(UserError, match="integers that are no classes"):
        read_labels(table, features, "label", None)
