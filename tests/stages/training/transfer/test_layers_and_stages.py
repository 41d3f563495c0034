"""Which layer matches which, and which step trains what."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.config import LAST_STATES, TransferConfig
from teacher_cache.stages.training.layers import ALL, Schedule, layer_pairs


@pytest.mark.parametrize(
    ("cached", "num_layers", "expected"),
    [
        (range(4), 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (range(6), 4, [(0, 1), (1, 2), (2, 3), (3, 5)]),  # 1.5 and 4.5 to the even ones
        (range(12), 4, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ([0, 5], 4, [(1, 0), (2, 5), (3, 5)]),  # 0.5, 1, 1.5, 2
        ([11], 4, [(2, 11), (3, 11)]),
        ([11], 1, [(0, 11)]),
        (range(2), 1, [(0, 1)]),
        ([0, 5, LAST_STATES], 3, [(0, 0), (1, 5), (2, LAST_STATES)]),
        ([LAST_STATES], 2, [(1, LAST_STATES)]),
    ],
)
def test_by_proportion(cached, num_layers, expected) -> None:
    assert list(layer_pairs(list(cached), num_layers, option="--x")) == expected


def test_as_given() -> None:
    assert layer_pairs([0, 5], 4, [(3, 0), (1, 5)], option="--x") == ((3, 0), (1, 5))
    config = TransferConfig.model_validate({"hidden_weight": 1, "hidden_layer_map": "3:0, 1:last"})
    given = config.hidden_layer_map
    found = layer_pairs([0, 5, LAST_STATES], 4, given, option="--x")
    assert found == ((3, 0), (1, LAST_STATES))
    with pytest.raises(UserError, match=r"--x 3:0,1:last names layer last .* cache holds 0, 5:"):
        layer_pairs([0, 5], 4, given, option="--x")
    with pytest.raises(UserError, match=r"names layer 7 of the teacher, .* holds 0, last:"):
        layer_pairs([0, LAST_STATES], 4, [(0, 7)], option="--x")


def test_a_map_has_no_last_states() -> None:
    with pytest.raises(ValidationError, match="as in 0:1,3:5; found 0:last"):
        TransferConfig.model_validate({"attention_weight": 1, "attention_layer_map": "0:last"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([(4, 0)], r"--x 4:0 names layer 4 of the student, which has 4, 0 to 3"),
        ([(0, 1)], r"--x 0:1 names layer 1 of the teacher, and the cache holds 0, 5"),
        ([(0, 0), (0, 5)], r"--x 0:0,0:5 names a layer of the student twice"),
    ],
)
def test_refuses_layers_that_are_not_there(given, message) -> None:
    with pytest.raises(UserError, match=message):
        layer_pairs([0, 5], 4, given, option="--x")


def staged(**options: object) -> list[str]:
    config = TransferConfig.model_validate({"transfer_schedule": "staged", **options})
    schedule = Schedule.of(config, 10)
    return ["+".join(sorted(schedule.stages(step))) for step in range(10)]


def test_stages_follow_each_other() -> None:
    both = staged(attention_weight=1, hidden_weight=1, transfer_shares="0.3,0.2")
    assert both == ["attention"] * 3 + ["hidden"] * 2 + ["others"] * 5
    assert staged(attention_weight=1) == ["attention"] * 2 + ["others"] * 8
    assert staged(hidden_weight=1) == ["hidden"] * 2 + ["others"] * 8


def test_together_is_all_in_every_step() -> None:
    schedule = Schedule.of(TransferConfig(attention_weight=1), 10)
    assert all(schedule.stages(step) == ALL for step in range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_loss": "cosine"}, "--attention-loss is an option of --attention-weight"),
        ({"hidden_layer_map": "0:0"}, "--hidden-layer-map is an option of --hidden-weight"),
        ({"transfer_schedule": "staged"}, "option of --attention-weight or --hidden-weight"),
        ({"attention_weight": 1, "transfer_shares": "0.1,0.1"}, "--transfer-schedule staged"),
        ({"attention_weight": 1, "attention_layer_map": "0-1"}, "found 0-1"),
        (
            {"attention_weight": 1, "transfer_schedule": "staged", "transfer_shares": "0.5,0.5"},
            "--transfer-shares is 0.5,0.5: give two shares",
        ),
    ],
)
def test_options_without_what_they_are_of_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TransferConfig.model_validate(options)


def test_pairs_are_read_from_text() -> None:
    config = TransferConfig.model_validate(
        {"attention_weight": 1, "attention_layer_map": "0:1, 3:5"}
    )
    assert config.attention_layer_map == ((0, 1), (3, 5))
