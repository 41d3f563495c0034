from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.attention_bytes import Measured, Row, goals, linear, root_of_one
from teacher_cache.cache.codecs.attention import AttentionCodec, row_kl


def test_every_mode_is_measured_against_its_own_map() -> None:
    full = AttentionCodec(mode="full", layers=(0, 1), num_heads=3, is_causal=True)
    measured = Measured(full, "last")
    reach = torch.ones(5, 5, dtype=torch.bool).tril()
    logits = 3 * torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    heads = logits.masked_fill(~reach, -torch.inf).softmax(-1)
    for layer in (0, 1):
        measured(f"attention_{layer}", 0, 0, heads)
    assert measured.bytes == {"cls": 2 * 5, "mean": 2 * 15, "full": 2 * 15 * 3}
    assert {mode: len(np.concatenate(kls)) for mode, kls in measured.kls.items()} == {
        "cls": 2,
        "mean": 2 * 5,
        "full": 2 * 5 * 3,
    }
    kls: Any = measured.kls["mean"][0]
    codec = measured.codecs["mean"]
    exact = heads.mean(0).numpy()
    np.testing.assert_array_equal(kls, row_kl(exact, codec.decode(codec.encode(exact), 5)))
    assert all(np.isfinite(one).all() for of_one in measured.others.values() for one in of_one)


def test_other_ways_of_storing_a_byte() -> None:
    rows = np.array([[0.0, 0.001, 0.999]])
    assert linear(rows).tolist() == [[0.25, 0.25, 255.0]]
    assert root_of_one(rows) == pytest.approx(np.array([[1 / 12, 64 + 1 / 12, 255**2 + 1 / 12]]))


@pytest.mark.parametrize(
    ("mode", "heads", "is_causal", "bound", "applies"),
    [
        ("mean", 12, False, 20, True),
        ("mean", 12, True, 40, True),
        ("mean", 9, True, 40, False),
        ("cls", 9, True, 20, True),
        ("full", 9, True, 3.8, True),
    ],
)
def test_goals(mode: Any, heads: int, is_causal: bool, bound: float, applies: bool) -> None:
    row = Row("t", mode, heads, 6, is_causal, 10.0, stored=2.0, half=80.0, kl=2e-3)
    smaller, kl = goals([row])
    assert (smaller.value, smaller.bound, smaller.applies) == (40.0, bound, applies)
    assert smaller.at_least and kl.verdict == "missed"
