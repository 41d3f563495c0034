"""What a model says of a document does not depend on what shares its pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BigBirdConfig,
    BloomConfig,
    ConvBertConfig,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
    NystromformerConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ReformerConfig,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.batching import ALONE, PACKED, PADDED, Batching, log_probs_close
from teacher_cache.stages.models.causal import language_model_batching
from teacher_cache.stages.models.inference import read_in_passes
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.load import ClassificationTeacher, load_teacher
from tests.tiny_models import tiny_language_model

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def longrope(**changes: Any) -> Phi3Config:
    """Short factors up to 20 tokens, long ones beyond."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0, 5, 6, 8, 10, 16, 24, 32],
        "original_max_position_embeddings": 20,
    }
    return Phi3Config(
        **SHAPE,
        num_key_value_heads=1,
        max_position_embeddings=200,
        original_max_position_embeddings=20,
        rope_parameters=rope,
        initializer_range=0.5,
        **changes,
    )


# By the rows that each needs.
CLASSIFIERS: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "bert": ("padded", lambda: BertConfig(**SHAPE)),
    "fnet": ("equal", lambda: FNetConfig(**SHAPE)),
    "convbert": ("equal", lambda: ConvBertConfig(**SHAPE, embedding_size=32)),
    "nystromformer": ("equal", lambda: NystromformerConfig(**SHAPE)),
    "longrope": ("padded", lambda: longrope()),
    # Full attention up to (5 + 2 random blocks) times 4 tokens.
    "big_bird": ("equal", lambda: BigBirdConfig(**SHAPE, block_size=4, num_random_blocks=1)),
}


def written(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> ClassificationTeacher:
    """A loaded classifier whose weights are wide enough to tell texts apart."""
    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    config.id2label = {0: "no", 1: "yes", 2: "else"}
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_teacher(TeacherConfig(teacher=str(folder), device="cpu", max_length=90))


def logits(teacher: ClassificationTeacher, ids: list[np.ndarray], batch_tokens: int) -> np.ndarray:
    outputs = run_teacher(teacher, ids, batch_tokens=batch_tokens, pooled_width=None)
    return outputs.vectors["class_logits"]


def documents(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1000, 5000, length).astype(np.uint32) for length in lengths]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_class_logits_are_those_of_the_document_alone(
    name: str, tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, config = CLASSIFIERS[name]
    teacher = written(config(), bert_tokenizer, tmp_path)
    assert teacher.batching.rows == rows
    assert bool(teacher.batching.borders) == (name == "longrope")
    ids = documents(5, 60, 21, 20, 5, 33, 80, 12)
    for batch_tokens in (10_000, 100):
        found = logits(teacher, ids, batch_tokens)
        for one, of_one in zip(ids, found, strict=True):
            fresh: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
            with torch.no_grad():
                alone = fresh(torch.from_numpy(one.astype(np.int64))[None]).logits[0].numpy()
            np.testing.assert_allclose(of_one, alone, rtol=0, atol=2e-4)


def test_a_model_that_hashes_at_random_is_refused(
    tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = ReformerConfig(
        hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32,
        attn_layers=["lsh"], axial_pos_embds=False, max_position_embeddings=128,
        lsh_attn_chunk_length=8, num_hashes=1, is_decoder=False, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"says something else of a text each time"):
        written(config, bert_tokenizer, tmp_path)


def test_longrope_packs_only_below_its_border() -> None:
    model = tiny_language_model(longrope(vocab_size=60))
    assert language_model_batching("it", model, max_length=20).rows == "packed"
    found = language_model_batching("it", model, max_length=90)
    assert (found.rows, found.borders) == ("padded", (20,))


@pytest.mark.parametrize("bias", ["none", "masked", "shifted", "-inf"])
def test_what_masks_or_shifts_logits_hides_no_fault(bias: str) -> None:
    """BLOOM keeps no packed documents apart, whatever its largest logit is."""
    values = torch.zeros(60)
    if bias == "shifted":
        values += 1e5
    elif bias != "none":
        values[40:] = -torch.inf if bias == "-inf" else -1e9
    for config, rows in (
        (BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2,
                     initializer_range=0.3), "padded"),
        (LlamaConfig(vocab_size=60, **SHAPE), "packed"),
    ):  # fmt: skip
        model: Any = tiny_language_model(config)
        headed = nn.Linear(32, 60)
        headed.weight, headed.bias = model.lm_head.weight, nn.Parameter(values)
        model.lm_head = headed
        assert language_model_batching("it", model, max_length=24).rows == rows


def test_a_model_that_looks_ahead_is_found_behind_masked_logits() -> None:
    model: Any = tiny_language_model(BertConfig(vocab_size=60, **SHAPE))
    model.cls.predictions.bias.data[50:] = -1e9
    with pytest.raises(UserError, match="looks at later tokens"):
        language_model_batching("it", model, max_length=24)


def test_a_decoder_without_padding_pools_at_the_last_token(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Even where that is the end-of-text token, with which it fills batches."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(gpt2_tokenizer), n_embd=32, n_layer=2, n_head=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    gpt2_tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherConfig(teacher=str(tmp_path), device="cpu"))
    end = gpt2_tokenizer.eos_token_id
    ids = documents(4, 9, 9, 6)
    ids[0][-1] = ids[2][-1] = ids[3][-1] = ids[3][-2] = end
    found = logits(teacher, ids, 1000)
    fresh: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert fresh.config.pad_token_id is None
    for one, of_one in zip(ids, found, strict=True):
        with torch.no_grad():
            alone = fresh(torch.from_numpy(one.astype(np.int64))[None]).logits[0].numpy()
        np.testing.assert_allclose(of_one, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_ids", range(2, 10))
def test_a_vocabulary_may_be_small(num_ids: int) -> None:
    """Whatever the last token of the document that is tried is, another one takes its place."""
    model = tiny_language_model(LlamaConfig(vocab_size=num_ids, **SHAPE))
    assert language_model_batching("it", model, max_length=24) == PACKED


def test_batches_of_each_kind() -> None:
    ids = [np.arange(n, dtype=np.uint32) for n in (3, 9, 3, 5, 12)]

    def lengths(batching: Batching, max_tokens: int = 100) -> list[list[int]]:
        batches = batching.batches(ids, max_tokens=max_tokens)
        assert sorted(np.concatenate(batches).tolist()) == [0, 1, 2, 3, 4]
        return [[len(ids[i]) for i in batch] for batch in batches]

    assert lengths(PADDED) == [[12, 9, 5, 3, 3]]
    assert lengths(PADDED, 24) == [[12, 9], [5, 3, 3]]
    assert lengths(Batching(borders=(5,))) == [[12, 9], [5, 3, 3]]
    assert lengths(Batching(rows="equal")) == [[12], [9], [5], [3, 3]]
    assert lengths(ALONE) == [[12], [9], [5], [3], [3]]
    assert lengths(Batching(counted_id=4)) == [[12, 9, 5], [3, 3]]
    assert lengths(Batching(end_id=2)) == [[12, 9, 5], [3, 3]]


def test_close_logits() -> None:
    exact = torch.tensor([[1.0, 2.0, -torch.inf, -1e9]])
    assert log_probs_close(exact + 1e-5, exact)
    assert log_probs_close(exact + 7, exact)
    assert not log_probs_close(torch.tensor([[1.0, 2.1, -torch.inf, -1e9]]), exact)
    assert not log_probs_close(torch.tensor([[1.0, 2.0, 0.0, -1e9]]), exact)
    assert not log_probs_close(exact * torch.nan, exact)


def test_a_classifier_in_training_reads_each_text_as_if_it_stood_alone() -> None:
    torch.manual_seed(0)
    config = FNetConfig(**SHAPE, vocab_size=50, hidden_dropout_prob=0.0)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    names, ids = list(model.state_dict()), torch.randint(4, 50, (4, 9))
    lengths = [4, 9, 7, 4]
    mask = torch.stack([torch.arange(9) < length for length in lengths]).long()
    alone = [model(ids[i : i + 1, :n]).logits for i, n in enumerate(lengths)]
    together = model(ids, attention_mask=mask).logits
    assert not torch.allclose(together, torch.cat(alone), atol=1e-3), "it minds its neighbours"

    read_in_passes(model, Batching(rows="equal"))
    found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, torch.cat(alone))
    weight = model.classifier.weight
    (expected,) = torch.autograd.grad(torch.cat(alone).square().sum(), weight)
    (gradient,) = torch.autograd.grad(found.square().sum(), weight)
    torch.testing.assert_close(gradient, expected)
    assert list(model.state_dict()) == names, "checkpoints are as they were"


def test_what_a_batching_costs_is_measured_and_said() -> None:
    model = tiny_language_model(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2))
    found = language_model_batching("it", model, max_length=90)
    assert found == PADDED and found.cost is not None and found.cost > 0
    assert f"({found.cost:.1f} times as long" in str(found)
    assert found.to_json() == PADDED.to_json(), "a time is no property of a cache"
    packs = tiny_language_model(LlamaConfig(vocab_size=60, **SHAPE))
    assert language_model_batching("it", packs, max_length=90).cost is None
