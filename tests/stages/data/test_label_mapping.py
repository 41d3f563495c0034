from __future__ import annotations

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.labels import is_generic, map_labels

NAMED = {0: "NEGATIVE", 1: "POSITIVE"}
GENERIC = {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("teacher", [NAMED, GENERIC])
def test_integers_are_class_ids(teacher):
    assert map_labels([0, 1], teacher) == {0: 0, 1: 1}


@pytest.mark.parametrize("values", [[0, 1, 2], [-2, 0, 1]])
def test_integers_outside_the_teachers_classes_are_named(values):
    outside = str(next(value for value in values if value not in NAMED))
    with pytest.raises(UserError, match=rf"label {outside}, .* 2 classes \(0 NEGATIVE, 1 POS"):
        map_labels(values, NAMED)


def test_names_match_whatever_their_case():
    assert map_labels(["Positive", "negative"], NAMED) == {"Positive": 1, "negative": 0}


def test_names_need_an_order_when_the_teacher_has_none():
    with pytest.raises(UserError, match=r"have no names .* --label-names neg,pos"):
        map_labels(["neg", "pos"], GENERIC)
    assert map_labels(["neg", "pos"], GENERIC, ("pos", "neg")) == {"neg": 1, "pos": 0}


def test_names_that_the_teacher_does_not_have_are_named():
    with pytest.raises(UserError, match="the labels bad, good of the corpus are none of the"):
        map_labels(["bad", "good"], NAMED)
    with pytest.raises(UserError, match="the label neutral of the corpus is none of the"):
        map_labels(["negative", "neutral", "positive"], NAMED)


def test_explicit_names_bridge_other_words_for_the_same_classes():
    assert map_labels(["neg", "pos"], NAMED, ("neg", "pos")) == {"neg": 0, "pos": 1}


def test_explicit_names_must_cover_the_corpus():
    with pytest.raises(UserError, match="gives neg, pos: add neutral"):
        map_labels(["neg", "neutral", "pos"], GENERIC, ("neg", "pos"))


def test_explicit_names_must_be_different():
    with pytest.raises(UserError, match="gives a name twice"):
        map_labels(["neg"], GENERIC, ("neg", "NEG"))


def test_explicit_names_must_fit_the_teacher():
    with pytest.raises(UserError, match="label 2, and the teacher has 2 classes"):
        map_labels(["neg", "pos"], GENERIC, ("neg", "pos", "neutral"))


def test_explicit_names_may_not_contradict_the_teacher():
    assert map_labels(["positive"], NAMED, ("negative", "positive")) == {"positive": 1}
    with pytest.raises(UserError, match="give the teacher's order"):
        map_labels(["negative", "positive"], NAMED, ("positive", "negative"))


def test_a_published_order_stands_where_the_names_say_nothing():
    for teacher in (NAMED, GENERIC):
        mapped = map_labels(["neg", "pos"], teacher, names_are_ordered=True)
        assert mapped == {"neg": 0, "pos": 1}


def test_names_win_over_a_published_order():
    mapped = map_labels(["positive", "negative"], NAMED, names_are_ordered=True)
    assert mapped == {"positive": 1, "negative": 0}


def test_a_published_order_of_too_many_classes_is_refused():
    with pytest.raises(UserError, match="label 2, and the teacher has 2"):
        map_labels(["a", "b", "c"], GENERIC, names_are_ordered=True)


def test_a_published_order_is_not_believed_against_a_teachers_own_names():
    with pytest.raises(UserError, match=r"bad, good .* none of the teacher's classes"):
        map_labels(["bad", "good"], NAMED, names_are_ordered=True)


def test_beginnings_of_names_decide_whatever_the_order():
    turned = {0: "POSITIVE", 1: "NEGATIVE"}
    assert map_labels(["neg", "pos"], NAMED) == {"neg": 0, "pos": 1}
    assert map_labels(["neg", "pos"], turned, names_are_ordered=True) == {"neg": 1, "pos": 0}
    with pytest.raises(UserError, match="give the teacher's order"):
        map_labels(["neg", "pos"], turned, ("neg", "pos"))
    with pytest.raises(UserError, match="none of the teacher's classes"):
        map_labels(["n", "p"], NAMED)


@pytest.mark.parametrize("name", ["neg|pos", "neg, pos", "negative sarcasm", "pos/neg", "neg2"])
def test_other_words_behind_a_beginning_make_another_name(name):
    with pytest.raises(UserError, match="none of the teacher's classes"):
        map_labels([name, "positive"], NAMED)


def test_accents_are_the_same_however_they_are_composed():
    assert map_labels(["caf\u0065\u0301", "the"], {0: "The", 1: "Caf\u00e9"}) == {
        "caf\u0065\u0301": 1,
        "the": 0,
    }


def test_integers_that_a_class_feature_names():
    assert map_labels(["1", "0"], NAMED, names_are_ordered=True) == {"1": 1, "0": 0}
    stars = {0: "1 star", 1: "2 stars"}
    assert map_labels(["1", "2"], stars, names_are_ordered=True) == {"1": 0, "2": 1}


def test_a_map_of_truths():
    given = ["true=NEGATIVE", "False=1"]
    assert map_labels([0, 1], NAMED, label_map=given) == {1: 0, 0: 1}


def test_placeholders_are_told_from_names():
    assert is_generic(GENERIC)
    assert not is_generic(NAMED)
    assert not is_generic({0: "LABEL_0", 1: "spam"})


def test_spellings_of_one_name_are_one_class():
    assert map_labels(["Spam", "spam", "not-spam"], {0: "NOT_SPAM", 1: "spam"}) == {
        "Spam": 1,
        "spam": 1,
        "not-spam": 0,
    }
    assert map_labels(["ham", "Spam", "spam"], GENERIC, ("ham", "SPAM")) == {
        "ham": 0,
        "Spam": 1,
        "spam": 1,
    }


def test_a_name_and_its_beginning_may_be_one_class_or_two():
    with pytest.raises(
        UserError, match=r"'pos' and 'positive' .* both be .*1 POSITIVE.*--label-map"
    ):
        map_labels(["neg", "pos", "positive"], NAMED)


def test_a_teachers_exact_name_goes_before_another_spelling():
    assert map_labels(["Yes", "yes"], {0: "yes", 1: "Yes"}) == {"Yes": 1, "yes": 0}


STARS = {0: "1 star", 1: "2 stars", 2: "3 stars"}


def test_integers_that_the_teachers_names_alone_hold():
    assert map_labels([1, 2, 3], STARS) == {1: 0, 2: 1, 3: 2}
    assert map_labels([0, 1, 2], STARS) == {0: 0, 1: 1, 2: 2}
    assert map_labels([0, 1], {0: "0", 1: "1"}) == {0: 0, 1: 1}


def test_integers_that_may_be_ids_or_names_are_refused_with_both_readings():
    with pytest.raises(
        UserError, match=r"label 1 may be .*class 1 '2 stars' or .*class 0 '1 star'"
    ):
        map_labels([1, 2], STARS)
    with pytest.raises(UserError, match=r"label 0 may be .*class 0 'True' or .*class 1 'False'"):
        map_labels([0, 1], {0: "True", 1: "False"})
    assert map_labels([1, 2], STARS, label_map=("1=1 star", "2=2 stars")) == {1: 0, 2: 1}


def test_placeholders_in_the_data_are_ids():
    assert map_labels(["LABEL_1", "LABEL_0"], NAMED) == {"LABEL_1": 1, "LABEL_0": 0}


def test_a_map_decides_alone():
    assert map_labels([0, 1], NAMED, label_map=("0=POSITIVE", "1=0")) == {0: 1, 1: 0}
    assert map_labels(["a", "B"], NAMED, label_map=("a=positive", "b=NEGATIVE")) == {"a": 1, "B": 0}
    assert map_labels(["x=y", "z"], NAMED, label_map=("x=y=1", "z=0")) == {"x=y": 1, "z": 0}


@pytest.mark.parametrize(
    ("given", "saying"),
    [
        (("0=POSITIVE",), "says nothing of 1"),
        (("0=POSITIVE", "1=5"), "has '1=5', expected"),
        (("0", "1=1"), "has '0', expected"),
        (("=1", "1=1"), "has '=1', expected"),
    ],
)
def test_a_map_that_is_none(given, saying):
    with pytest.raises(UserError, match=saying):
        map_labels([0, 1], NAMED, label_map=given)
