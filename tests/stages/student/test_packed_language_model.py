"""Pre-trained language models on packed rows: one document at a time, in states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from teacher_cache.stages.models.batching import PACKED
from teacher_cache.stages.models.causal import language_model_batching
from teacher_cache.stages.student.pretrained import PackedLanguageModel, places
from tests.tiny_models import tiny_language_model

NUM_IDS = 64
_LLAMA: dict[str, Any] = {
    "vocab_size": NUM_IDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=NUM_IDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gemma2": lambda: Gemma2Config(
        **_LLAMA, sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8,
    ),
    "phi": lambda: PhiConfig(
        **{name: one for name, one in _LLAMA.items() if name != "head_dim"},
        embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "cohere": lambda: CohereConfig(
        **{name: one for name, one in _LLAMA.items() if name != "head_dim"}, logit_scale=0.25,
    ),
    "bloom": lambda: BloomConfig(vocab_size=NUM_IDS, hidden_size=16, n_layer=2, n_head=2),
    "mamba": lambda: MambaConfig(
        vocab_size=NUM_IDS, hidden_size=16, num_hidden_layers=2, state_size=4
    ),
}  # fmt: skip
ROW_A_DOCUMENT = ("bloom", "mamba")
LENGTHS = ((5, 1, 9), (7,), (2, 3))  # of the documents of each row


def make(name: str) -> PackedLanguageModel:
    """A model in float64, with biases that are not 0."""
    model = tiny_language_model(CONFIGS[name]())
    for one in model.parameters():
        if one.ndim == 1:
            one.data += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3))
    batching = language_model_batching(name, model, max_length=24)
    assert (batching == PACKED) == (name not in ROW_A_DOCUMENT)
    return PackedLanguageModel(model.double(), batching=batching)


def batch() -> dict[str, Tensor]:
    longest = max(sum(of_one) for of_one in LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, NUM_IDS, (len(LENGTHS), longest), generator=generator)
    mask, seq_idx = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.int32)
    for row, of_one in enumerate(LENGTHS):
        mask[row, : sum(of_one)] = 1
        numbers = torch.repeat_interleave(torch.arange(len(of_one)), torch.tensor(of_one))
        seq_idx[row] = len(of_one) - 1  # padding belongs to the last document
        seq_idx[row, : len(numbers)] = numbers.int()
    return {"input_ids": ids, "attention_mask": mask, "seq_idx": seq_idx}


def one_at_a_time(model: PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    """[N, V] logits of the real tokens, by the model's own forward pass."""
    found = []
    for row, of_one in enumerate(LENGTHS):
        start = 0
        for length in of_one:
            ids = given["input_ids"][row, start : start + length]
            found.append(model(input_ids=ids[None], use_cache=False).logits[0])
            start += length
    return torch.cat(found)


def head_of(trained: PackedLanguageModel, states: Tensor) -> Tensor:
    head = trained.output_head
    logits = head.scale * nn.functional.linear(states, head.weight, head.bias)
    return logits if head.soft_cap is None else head.soft_cap * (logits / head.soft_cap).tanh()


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    model.zero_grad()
    (logits * weights).sum().backward()
    return {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_one_document_at_a_time(name: str) -> None:
    trained, given = make(name), batch()
    trained.train()
    expected = one_at_a_time(trained.student, given)
    slow = gradients(trained.student, expected)
    states = trained(**given).final_states[given["attention_mask"].bool()]
    found = head_of(trained, states)
    # transformers' Mamba gives float32 logits of float64 states.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    fast = gradients(trained.student, found)
    assert fast.keys() == slow.keys()
    for one, gradient in slow.items():
        torch.testing.assert_close(fast[one], gradient, rtol=1e-4, atol=1e-5, msg=one)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_padding_holds_anything(name: str) -> None:
    trained, given = make(name), batch()
    real = given["attention_mask"].bool()
    states = trained(**given).final_states[real]
    given["input_ids"] = given["input_ids"].where(real, 7)
    assert torch.equal(trained(**given).final_states[real], states)


def test_each_head_has_what_it_is_there_for() -> None:
    heads = {name: make(name).output_head for name in ("gemma2", "phi", "cohere")}
    assert heads["gemma2"].soft_cap == 3.0
    assert heads["phi"].bias is not None and bool(heads["phi"].bias.any())
    assert heads["cohere"].scale == 0.25


def test_places_begin_anew() -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2], [4, 4, 4, 4, 4, 4]])
    assert places(seq_idx).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_its_state_is_saved_and_read_back(name: str) -> None:
    """A tied weight once, as the file format wants it."""
    trained, other = make(name), make(name)
    state = trained.state_dict()
    assert ("student.lm_head.weight" in state) == (name == "llama-untied")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(load(save(state)))
    for one, two in zip(trained.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
