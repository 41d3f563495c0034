"""What a classification head reads, against the models' own layers run by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.tokenization import Sample
from teacher_cache.stages.models.pretrained import on_device
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.forward import (
    find_pooled_width,
    logits_and_pooled,
    run_teacher,
)
from teacher_cache.stages.teacher.load import ClassificationTeacher, load_teacher
from tests.tiny_runs import said_of

WIDTH, PAD_ID = 32, 1
SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "pad_token_id": PAD_ID,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
GPT2_SHAPE: dict[str, Any] = {"vocab_size": 60, "pad_token_id": PAD_ID, "n_embd": WIDTH}
CPU = torch.device("cpu")


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SHAPE))


def roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**SHAPE))


def distilbert() -> PreTrainedModel:
    config = DistilBertConfig(
        vocab_size=60, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=64, pad_token_id=PAD_ID
    )
    return DistilBertForSequenceClassification(config)


def gpt2() -> PreTrainedModel:
    return GPT2ForSequenceClassification(GPT2Config(**GPT2_SHAPE, n_layer=2, n_head=2))


def llama() -> PreTrainedModel:
    config = LlamaConfig(**SHAPE, bos_token_id=2, eos_token_id=2)
    return LlamaForSequenceClassification(config)


def pooler(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(ids).pooler_output


def first(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(ids).last_hidden_state[:, 0]


def last(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(ids).last_hidden_state[:, -1]


ARCHITECTURES = {bert: pooler, roberta: first, distilbert: first, gpt2: last, llama: last}


def started(make: Callable[[], PreTrainedModel], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return on_device(make().bfloat16() if dtype is torch.bfloat16 else make(), CPU)


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random ids, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(3, 60, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.where(mask, torch.tensor(PAD_ID)), mask.long()


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_the_vector_that_the_head_reads(make: Callable[[], PreTrainedModel]) -> None:
    model = started(make)
    ids, mask = batch(3, 9, 1, 6)
    logits, pooled = logits_and_pooled(model, ids, mask)
    assert pooled.shape == (4, WIDTH) and pooled.dtype == torch.float32
    for row, length in enumerate(mask.sum(dim=1).tolist()):  # alone, without padding
        alone = ids[row : row + 1, :length]
        with torch.no_grad():
            expected = ARCHITECTURES[make](model, alone)[0]
            expected_logits = model(alone).logits[0]
        torch.testing.assert_close(pooled[row], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[row], expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_padding_changes_nothing(make: Callable[[], PreTrainedModel]) -> None:
    model = started(make)
    ids, mask = batch(5, 7)
    wide = [nn.functional.pad(one, (0, 20), value=fill) for one, fill in ((ids, PAD_ID), (mask, 0))]
    for found, expected in zip(
        logits_and_pooled(model, *wide), logits_and_pooled(model, ids, mask), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_it_comes_with_the_logits_of_a_single_pass(make: Callable[[], PreTrainedModel]) -> None:
    model = started(make, torch.bfloat16)
    passes: list[None] = []
    model.base_model.register_forward_hook(lambda *_: passes.append(None))
    ids, mask = batch(4, 8)
    logits, _ = logits_and_pooled(model, ids, mask)
    assert len(passes) == 1
    # The hooks are gone, and were only looking.
    hooked = [one for one in model.modules() if one._forward_hooks and one is not model.base_model]
    assert hooked == []
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits.float(), logits)


def test_a_decoder_that_pools_at_an_earlier_token_is_followed() -> None:
    # Its padding token at the text's own end: the model pools at the last token before it.
    model = started(gpt2)
    ids, mask = batch(6)
    ids[0, 4:] = PAD_ID
    _, pooled = logits_and_pooled(model, ids, mask)
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state[0, 3]
    torch.testing.assert_close(pooled[0], expected, rtol=0, atol=1e-6)


class RowsChanged(nn.Module):
    """A head whose linear layer is not the last to touch the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(WIDTH, 2)

    def forward(self, states: Tensor) -> Tensor:
        return self.rows(states) * states.new_tensor([1.0, 2.0])


class WithoutLinear(nn.Module):
    """A head of another kind."""

    def forward(self, states: Tensor) -> Tensor:
        return states[..., :2]


@pytest.mark.parametrize("head", [RowsChanged, WithoutLinear])
def test_a_head_that_cannot_be_read_is_refused(head: Callable[[], nn.Module]) -> None:
    model = started(gpt2)
    model.score = head()
    with pytest.raises(UserError, match=r"cannot tell what .*GPT2ForSequenceClassification reads"):
        logits_and_pooled(model, *batch(4, 3))


@pytest.fixture(scope="module")
def teacher(tiny_bert: Path) -> ClassificationTeacher:
    return load_teacher(TeacherConfig(teacher=str(tiny_bert), device="cpu"))


def sample_ids(num: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1000, 30000, rng.integers(1, 40)).astype(np.uint32) for _ in range(num)]


def test_the_width_is_found_and_the_order_is_the_samples(teacher: ClassificationTeacher) -> None:
    assert find_pooled_width(teacher) == 32
    ids = sample_ids(20)
    alone, together = (
        run_teacher(teacher, ids, batch_tokens=budget, pooled_width=32).vectors
        for budget in (1, 1000)
    )
    assert alone.keys() == {"class_logits", "pooled"}
    for name in alone:
        np.testing.assert_allclose(alone[name], together[name], rtol=0, atol=1e-5)
    plain = run_teacher(teacher, ids, batch_tokens=1000, pooled_width=None).vectors
    assert plain.keys() == {"class_logits"}
    assert np.array_equal(plain["class_logits"], together["class_logits"])


def test_out_of_memory_halves_a_batch(teacher: ClassificationTeacher) -> None:
    model, limit = teacher.model, 4
    refused: list[int] = []

    def scarce(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > limit:
            refused.append(len(kwargs["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    ids = sample_ids(16)
    expected = run_teacher(teacher, ids, batch_tokens=10_000, pooled_width=32)
    hook = model.register_forward_pre_hook(scarce, with_kwargs=True)
    try:
        found = run_teacher(teacher, ids, batch_tokens=10_000, pooled_width=32)
    finally:
        hook.remove()
    assert (found.num_halvings, refused) == (3, [16, 8, 8])
    for name, values in expected.vectors.items():
        np.testing.assert_allclose(found.vectors[name], values, rtol=0, atol=1e-5)


def captured(teacher: ClassificationTeacher, pooled_width: int | None) -> Any:
    samples = [
        Sample(sample_id=bytes([i] * 16), input_ids=ids, label=None, was_truncated=False)
        for i, ids in enumerate(sample_ids(5))
    ]
    return said_of(teacher, samples, pooled_width=pooled_width)


def test_states_are_kept_in_half_precision(teacher: ClassificationTeacher) -> None:
    fields = captured(teacher, 32)
    assert fields["pooled"].dtype == np.float16 and fields["pooled"].shape == (5, 32)
    wide = run_teacher(teacher, sample_ids(5), batch_tokens=64, pooled_width=32).vectors["pooled"]
    np.testing.assert_allclose(fields["pooled"], wide, rtol=1e-3, atol=1e-6)
    assert "pooled" not in captured(teacher, None)


def test_a_state_beyond_half_precision_is_refused(teacher: ClassificationTeacher) -> None:
    largest = 65504.0

    def enlarged(_: nn.Module, inputs: Any, output: Any) -> Any:
        output.pooler_output[:, 0] = largest
        return output

    model: Any = teacher.model
    hook = model.bert.register_forward_hook(enlarged)
    try:
        assert captured(teacher, 32)["pooled"][:, 0].tolist() == [65504.0] * 5
        largest = 65505.0
        with pytest.raises(
            UserError, match=r"5 of .* pooled states .* beyond 65,504,.*without --hidden"
        ):
            captured(teacher, 32)
    finally:
        hook.remove()
