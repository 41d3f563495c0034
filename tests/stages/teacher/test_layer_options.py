from __future__ import annotations

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.teacher.config import CaptureConfig
from teacher_cache.stages.teacher.options import (
    HiddenOptions,
    check_options,
    chosen_layers,
    hidden_options,
    require_states,
)


def config_of(**changes: object) -> CaptureConfig:
    return CaptureConfig.model_validate({"teacher": "t"} | changes)


@pytest.mark.parametrize(
    ("hidden", "expected", "named"),
    [
        ("none", HiddenOptions(), None),
        ("pooled", HiddenOptions(pooled=True), "pooled"),
        ("5, 0,last ,5", HiddenOptions(last=True, layers=(0, 5)), "last,0,5"),
        ([3, "pooled"], HiddenOptions(pooled=True, layers=(3,)), "pooled,3"),
        (4, HiddenOptions(layers=(4,)), "4"),
    ],
)
def test_states_that_are_asked_for(
    hidden: object, expected: HiddenOptions, named: str | None
) -> None:
    found = hidden_options(config_of(hidden=hidden).layers)
    assert found == expected and found.named() == named


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": "pool"}, "--hidden is 'pool', expected none or.*pooled, last, all and numbers"),
        ({"hidden": "none,last"}, "--hidden is 'none,last'"),
        ({"hidden": "-1"}, "--hidden is '-1'"),
        ({"attention_layers": "all"}, "--attention-layers all is of attention maps"),
        ({"attention": "mean", "attention_layers": "0;1"}, "is '0;1', expected last, all or"),
        ({"task": "lm", "attention": "cls"}, "--attention cls is of classifiers"),
        ({"task": "lm", "hidden": "pooled,last"}, "--hidden pooled,last is of classifiers"),
        ({"task": "lm", "hidden": "last", "codec": "hidden"}, "the last states twice"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_options(config_of(**changes))


def test_what_has_one_is_let_pass() -> None:
    check_options(config_of(attention="cls", attention_layers=[0, 5], hidden="pooled,last"))
    check_options(config_of(task="lm", attention="full", hidden="last,3"))
    check_options(config_of(task="lm", codec="hidden", hidden=2))


def test_layers_of_maps() -> None:
    assert chosen_layers(None, [0, 1, 2], "t") == (2,)
    assert chosen_layers("last", [1, 4], "t") == (4,)
    assert chosen_layers("all", [1, 4], "t") == (1, 4)
    assert chosen_layers("2,0,2", [0, 1, 2], "t") == (0, 2)
    with pytest.raises(UserError, match="names layer 3, and of t the layers 0 to 2 give"):
        chosen_layers("0,3", [0, 1, 2], "t")
    with pytest.raises(UserError, match="names layer 2, and of t the layers 1, 4 give"):
        chosen_layers("2", [1, 4], "t")


def test_layers_of_states() -> None:
    require_states(HiddenOptions(last=True, layers=(0, 1)), 2, "t")
    with pytest.raises(UserError, match="--hidden last,2 names layer 2, and of t the layers 0 to"):
        require_states(HiddenOptions(last=True, layers=(2,)), 2, "t")
