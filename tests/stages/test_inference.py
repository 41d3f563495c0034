from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedModel,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.batching import PADDED
from teacher_cache.stages.models.inference import class_logits


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()


def samples(num: int, longest: int = 40, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(1000, 30000, size=rng.integers(1, longest)).astype(np.uint32)
        for _ in range(num)
    ]


def run(model: PreTrainedModel, ids: list[np.ndarray], **changes: Any) -> Any:
    given: dict[str, Any] = {"num_classes": 2, "pad_id": 0, "batching": PADDED, "max_tokens": 160}
    return class_logits(model, ids, **(given | changes))


def one_by_one(model: Any, ids: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        rows = [model(torch.from_numpy(one.astype(np.int64))[None]).logits[0] for one in ids]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("max_tokens", [1, 64, 500, 100_000])
def test_batches_change_nothing(model: PreTrainedModel, max_tokens: int) -> None:
    ids = samples(30)
    found = run(model, ids, max_tokens=max_tokens)
    assert found.logits.dtype == np.float32
    assert found.num_halvings == 0
    # In the samples' own order, whatever the order of the batches.
    np.testing.assert_allclose(found.logits, one_by_one(model, ids), rtol=0, atol=1e-6)


def test_what_fills_a_batch_is_masked(model: PreTrainedModel) -> None:
    ids = samples(12)
    found = run(model, ids, pad_id=12345)
    np.testing.assert_allclose(found.logits, run(model, ids).logits, rtol=0, atol=1e-6)


def test_no_samples(model: PreTrainedModel) -> None:
    assert run(model, []).logits.shape == (0, 2)


def test_the_caller_hears_of_every_batch(model: PreTrainedModel) -> None:
    ids = samples(30)
    heard: list[tuple[int, int]] = []
    run(model, ids, on_batch=lambda *counts: heard.append(counts))
    assert sum(num for num, _ in heard) == 30
    assert sum(tokens for _, tokens in heard) == sum(len(one) for one in ids)
    assert len(heard) > 1


class Scarce(torch.nn.Module):
    """A model whose device has memory for so many samples at a time."""

    def __init__(self, model: PreTrainedModel, limit: int, error: Exception):
        super().__init__()
        self.model = model
        self.device = model.device
        self.limit = limit
        self.error = error
        self.batches: list[tuple[int, int]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.batches.append((input_ids.shape[0], input_ids.shape[1]))
        if len(input_ids) > self.limit:
            raise self.error
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't"),
    ],
)
def test_out_of_memory_halves_a_batch_and_says_so(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    ids = samples(16)
    scarce: Any = Scarce(model, 4, error)
    heard: list[int] = []
    found = run(scarce, ids, max_tokens=100_000, on_batch=lambda num, _: heard.append(num))
    assert found.num_halvings == 3  # 16 to 8 and 8, each to 4 and 4
    assert sorted(heard) == [4, 4, 4, 4]
    np.testing.assert_allclose(found.logits, one_by_one(model, ids), rtol=0, atol=1e-6)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"out of memory on a batch of {num} samples of up to {longest} tokens"
        for num, longest in scarce.batches
        if num > 4
    ]
    assert "a smaller --batch-tokens avoids this" in caplog.text
    # The longest samples come first, so what does not fit is known at once.
    assert scarce.batches[0] == (16, max(len(one) for one in ids))


def test_one_sample_that_does_not_fit(model: PreTrainedModel) -> None:
    scarce: Any = Scarce(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match=r"one sample of 7 tokens does not fit.*--max-length"):
        run(scarce, [np.arange(7, dtype=np.uint32)])


def test_what_a_model_raises_itself_is_said_in_a_sentence(model: PreTrainedModel) -> None:
    scarce: Any = Scarce(model, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(UserError, match=r"the model fails on 3 samples of .* \(mat1 and mat2"):
        run(scarce, samples(3))


def test_half_precision_logits_come_back_as_float32(tiny_bert: Path) -> None:
    half = BertForSequenceClassification.from_pretrained(tiny_bert, dtype=torch.bfloat16).eval()
    assert run(half, samples(3)).logits.dtype == np.float32
