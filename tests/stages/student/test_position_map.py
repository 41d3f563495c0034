"""The position map against a loop over samples, and its choice for real tokenizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import PositionMap, choose

MAPS = (
    PositionMap(),
    PositionMap(mode="move_first_to_last"),
    PositionMap(mode="append", token_id=99),
)
any_map = st.sampled_from(MAPS)


def mapped(position_map: PositionMap, ids: list[int]) -> list[int]:
    """One sample, the obvious way."""
    if position_map.mode == "append":
        return [*ids, 99]
    return ids if position_map.mode == "identity" else [*ids[1:], ids[0]]


@given(
    position_map=any_map,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    sides=st.lists(st.integers(0, 9), min_size=5, max_size=5),
)
def test_a_batch_equals_a_loop_over_its_samples(position_map, lengths, sides) -> None:
    width = max(lengths)
    input_ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), []
    samples = []
    for row, (length, side) in enumerate(zip(lengths, sides, strict=False)):
        start = min(side, width - length)  # padding before, after, or on both sides
        samples.append([10 * row + t + 1 for t in range(length)])
        input_ids[row, start : start + length] = torch.tensor(samples[-1])
        mask.append([start <= t < start + length for t in range(width)])
    got_ids, got_mask = position_map.apply(input_ids, torch.tensor(mask))
    assert got_ids.shape == got_mask.shape and got_mask.dtype == torch.bool
    assert got_ids.shape[1] == width + (position_map.mode == "append")
    for sample, ids, real in zip(samples, got_ids, got_mask, strict=True):
        expected = mapped(position_map, sample)
        assert real.tolist() == [t < len(expected) for t in range(len(real))]
        assert ids[real].tolist() == expected


@given(position_map=any_map, length=st.integers(1, 50))
def test_source_positions_say_what_apply_does(position_map, length) -> None:
    position_map.check(length)
    ids = list(range(length))
    source = position_map.source_positions(length)
    assert [99 if s == -1 else ids[s] for s in source] == mapped(position_map, ids)


def test_check_finds_a_lost_token(monkeypatch) -> None:
    position_map = PositionMap()
    monkeypatch.setattr(
        PositionMap, "source_positions", lambda self, length: torch.tensor([0, 0, 2]).numpy()
    )
    with pytest.raises(ValueError, match="no permutation of 3"):
        position_map.check(3)


@pytest.mark.parametrize("position_map", MAPS)
def test_survives_its_dict(position_map) -> None:
    assert PositionMap.from_dict(position_map.to_dict()) == position_map


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "identify"}, "did you mean 'identity'"),
        ({"mode": "append"}, "token_id None: give one"),
        ({"mode": "identity", "token_id": 3}, "token_id 3"),
        ({"mode": "identity", "tokenid": 3}, "did you mean 'token_id'"),
    ],
)
def test_refuses_what_does_not_fit(values, message) -> None:
    with pytest.raises(UserError, match=message):
        PositionMap.from_dict(values)


def test_refuses_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        PositionMap().source_positions(0)


def test_choice_for_real_tokenizers(bert_tokenizer, gpt2_tokenizer) -> None:
    assert choose(bert_tokenizer, "cls") == PositionMap(mode="move_first_to_last")
    assert choose(gpt2_tokenizer, "cls") == PositionMap(mode="append", token_id=50256)
    for pooling in ("mean", "last"):
        assert choose(bert_tokenizer, pooling) == PositionMap()
    ids = torch.tensor(bert_tokenizer("a good film")["input_ids"])[None]
    moved, _ = choose(bert_tokenizer, "cls").apply(ids, torch.ones_like(ids, dtype=torch.bool))
    tokens = bert_tokenizer.convert_ids_to_tokens(moved[0].tolist())
    assert tokens == ["a", "good", "film", "[SEP]", "[CLS]"]


class StubTokenizer(SimpleNamespace):
    """A tokenizer that turns any text into the same ids."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


@pytest.mark.parametrize(
    ("cls_id", "eos_id", "ids", "expected"),
    [
        (1, 2, [7, 2, 1], PositionMap()),  # XLNet's order
        (1, 2, [1, 7, 2], PositionMap(mode="move_first_to_last")),
        (1, 2, [7], PositionMap(mode="append", token_id=2)),  # a CLS that is never put in
        (None, 2, [7, 2], PositionMap()),  # T5 already ends with its end-of-text token
        (None, 2, [], PositionMap(mode="append", token_id=2)),
    ],
)
def test_choice_by_where_the_tokens_stand(cls_id, eos_id, ids, expected) -> None:
    tokenizer = StubTokenizer(cls_token_id=cls_id, eos_token_id=eos_id, ids=ids)
    assert choose(cast(Any, tokenizer), "cls") == expected


@pytest.mark.parametrize(
    ("cls_id", "ids", "message"),
    [(None, [7], "no end-of-text token"), (1, [3, 1, 7], "position 1 of 3")],
)
def test_choice_refuses_a_tokenizer_without_a_place_to_pool(cls_id, ids, message) -> None:
    tokenizer = StubTokenizer(cls_token_id=cls_id, eos_token_id=None, ids=ids)
    with pytest.raises(UserError, match=message):
        choose(cast(Any, tokenizer), "cls")
