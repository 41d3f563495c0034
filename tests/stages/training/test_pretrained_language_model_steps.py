"""Steps of pre-trained students against slow ones: documents one at a time, by their own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.stages.models.batching import PACKED
from teacher_cache.stages.models.causal import language_model_batching
from teacher_cache.stages.student.pretrained import PackedLanguageModel
from tests.stages.training.test_language_model_trainer import (
    CODECS,
    NUM_LABELED,
    VOCAB_SIZE,
    assert_same,
    collated,
    make_data,
    make_samples,
    make_trainer,
    slow_step,
    step,
)
from tests.tiny_models import tiny_language_model

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    if name == "llama":
        return LlamaConfig(**_SHAPE, tie_word_embeddings=True)
    if name == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=8, n_layer=2, n_head=2, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    if name == "soft-capped":
        capped = {"head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 2.0}
        return Gemma2Config(**_SHAPE, **capped, sliding_window=4)
    if name == "scaled":
        return CohereConfig(**_SHAPE, logit_scale=0.5)
    return PhiConfig(**_SHAPE, resid_pdrop=0.0, embd_pdrop=0.0)  # with a bias


def make(name: str) -> PreTrainedModel:
    model = tiny_language_model(config_of(name))
    head: Any = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.data += torch.linspace(-1, 1, VOCAB_SIZE)
    return model.double()


def check(name: str, codec: Codec, folder: Path) -> None:
    samples = make_samples(codec)
    data = make_data(samples)
    expected = slow_step(codec, make(name), samples)
    assert language_model_batching(name, make(name).float(), max_length=24)
    trained = PackedLanguageModel(make(name), batching=PACKED)
    trainer = make_trainer(folder, codec, data, student=trained)
    unlabeled = list(range(NUM_LABELED, len(samples)))
    order = [[2], [3, 0], unlabeled[:1], [1], unlabeled[1:]]
    loss, gradients = step(trainer, collated(codec, data, order))
    found = {name.removeprefix("student."): one for name, one in gradients.items()}
    assert_same((loss, found), expected)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_that_of_single_documents(name: str, codec: str, tmp_path: Path) -> None:
    check(name, CODECS[codec], tmp_path)


@pytest.mark.parametrize("name", ["soft-capped", "scaled", "with a bias"])
def test_other_heads(name: str, tmp_path: Path) -> None:
    check(name, CODECS["topk"], tmp_path)
