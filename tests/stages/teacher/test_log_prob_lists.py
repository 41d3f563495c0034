"""Lists of most probable tokens against whole distributions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.cache_log_probs import ListedPositions, listed_positions

NUM_IDS, TOP_K = 30, 4
USED = np.ones(NUM_IDS, bool)
CODEC = TopKCodec(support_size=NUM_IDS, top_k=TOP_K, temperatures=(1.0,), is_exact=True)


def distributions(num: int, seed: int, spread: float) -> np.ndarray:
    """[num, NUM_IDS] float64 log-probs."""
    logits = spread * np.random.default_rng(seed).standard_normal((num, NUM_IDS))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def answers(exact: np.ndarray, ids: np.ndarray, k: int = TOP_K) -> list[dict[int, float] | None]:
    """As an engine gives them, float32: row t says what token t + 1 is."""
    lists: list[dict[int, float] | None] = [None]
    for row, real in zip(exact, ids[1:], strict=False):
        chosen = [*np.argsort(-row, kind="stable")[:k].tolist(), int(real)]
        lists.append({token_id: float(np.float32(row[token_id])) for token_id in chosen})
    return lists


def listed(ids: np.ndarray, lists: Any, codec: TopKCodec = CODEC) -> ListedPositions:
    used = np.ones(codec.support_size, bool)
    return listed_positions(codec, ids, lists, used=used, where="it")


@settings(max_examples=40)
@given(num=st.integers(1, 6), seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 4.0]))
def test_head_and_tail_are_the_distributions(num: int, seed: int, spread: float) -> None:
    exact = distributions(num, seed, spread)
    ids = np.random.default_rng(seed).integers(NUM_IDS, size=num)
    found = listed(ids, answers(exact, ids))
    decoded = CODEC.decode(CODEC.expand(CODEC.encode(found.reduced)), 1.0)
    assert decoded.ids is not None
    for place in range(num - 1):
        order = np.argsort(-exact[place], kind="stable")
        assert decoded.ids[place].tolist() == order[:TOP_K].tolist()
        head = exact[place, order[:TOP_K]]
        np.testing.assert_allclose(decoded.log_probs[place], head, atol=1e-2)  # float16
        true_tail = np.exp(exact[place, order[TOP_K:]]).sum()
        assert np.exp(decoded.tail_log_prob[place]) == pytest.approx(true_tail, rel=1e-2, abs=2e-5)
        assert found.reduced.next_log_prob[place] == pytest.approx(
            exact[place, ids[place + 1]], rel=1e-6
        )
        total = np.exp(np.append(decoded.log_probs[place], decoded.tail_log_prob[place])).sum()
        assert total == pytest.approx(1, abs=1e-6)
        assert found.reduced.top1_log_prob[place] == np.float32(exact[place].max())
    assert found.largest_sum <= 1 + 1e-6
    # After the last token nothing comes: one sure token, and no tail.
    assert decoded.log_probs[-1].tolist() == [0.0] + [-np.inf] * (TOP_K - 1)
    assert decoded.tail_log_prob[-1] == -np.inf


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
def test_what_float32_costs_a_tail(spread: float) -> None:
    """Of the number of ids that GPT-2 has."""
    num_ids = 50257
    codec = TopKCodec(support_size=num_ids, top_k=20, temperatures=(1.0,), is_exact=True)
    logits = spread * np.random.default_rng(0).standard_normal((20, num_ids))
    exact = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-exact, axis=1)[:, 3]
    found = listed(np.append(0, ids), answers(exact, np.append(0, ids), k=20), codec)
    tails = np.exp(found.reduced.tail_r[:-1, 0] + found.reduced.top1_log_prob[:-1])
    outside = np.sort(np.exp(exact), axis=1)[:, :-20]
    np.testing.assert_allclose(tails, outside.sum(axis=1), rtol=0, atol=1e-7)


def test_a_cancelled_tail_is_bounded_by_what_the_list_proves() -> None:
    """A sum of 1 and a little: below by the real token, above by the last of the head."""
    ids = np.array([0, 9])
    sure = {1: np.log(0.9), 2: np.log(0.1 - 1e-9), 3: -25.0, 4: -26.0}
    outside = listed(ids, [None, sure | {9: -30.0}])  # the real token is no part of the head
    tail = np.exp(outside.reduced.tail_r[0, 0] + outside.reduced.top1_log_prob[0])
    assert np.exp(-30.0) <= tail <= 26 * np.exp(-26.0) + 1e-15
    assert outside.num_below_resolution == 1
    above = {1: np.log(0.9), 2: np.log(0.1 + 1e-6), 9: -40.0, 4: -41.0}
    inside = listed(ids, [None, above])
    assert inside.reduced.tail_r[0, 0] == -np.inf
    assert inside.largest_sum == pytest.approx(1 + 1e-6)


def test_a_head_of_everything_has_no_tail() -> None:
    whole = TopKCodec(support_size=4, top_k=4, temperatures=(1.0,), is_exact=True)
    lists = [None, {i: float(np.log(p)) for i, p in enumerate((0.1, 0.2, 0.3, 0.39999))}]
    found = listed(np.array([0, 3]), lists, whole)
    assert found.reduced.tail_r[0, 0] == -np.inf


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "the list has 0 tokens, expected at least 4"),
        ({1: -1.0, 9: -2.0}, "it, token 1: the list has 2 tokens, expected at least 4: ask the"),
        ({1: -1.0, 2: -2.0, 3: -3.0, 4: -4.0}, "the list lacks the real token 9"),
        ({1: -1.0, 2: -2.0, 30: -3.0, 9: -4.0}, "the id 30 is no token of the tokenizer"),
        ({1: -1.0, 2: -2.0, -1: -3.0, 9: -4.0}, "the id -1 is no token"),
        ({1: 0.7, 2: -2.0, 3: -3.0, 9: -4.0}, "0.7 is no log-prob"),
        ({1: float("nan"), 2: -2.0, 3: -3.0, 9: -4.0}, "nan is no log-prob"),
        ({1: -0.7, 2: -1.2, 3: -6.9, 9: -7.6}, r"add up to 0\.7993, expected 0\.9870 to 1: these"),
        (
            {1: -0.1, 2: -0.2, 3: -0.3, 9: -0.4},
            r"token 1: the probabilities add up to 3\.1347, expected 0\.0000 to 1",
        ),
    ],
)
def test_refuses_lists_that_say_something_else(entry: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        listed(np.array([0, 9]), [None, entry])


def test_refuses_a_codec_that_needs_more() -> None:
    with pytest.raises(ValueError, match="at temperature 1 alone"):
        listed(np.array([0, 9]), [None, {}], TopKCodec(support_size=30, top_k=4))
    with pytest.raises(ValueError, match="1 lists for 2 tokens"):
        listed(np.array([0, 9]), [None])
