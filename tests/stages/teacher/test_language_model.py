"""Packed documents against the models' own answers, one document at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.batching import PACKED, PADDED, Batching
from teacher_cache.stages.models.causal import final_states, head_logits, language_model_batching
from teacher_cache.stages.models.pretrained import on_device
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import LanguageModelTeacher, identity, load_language_model
from tests.tiny_models import tiny_language_model, write_tiny_language_model

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
MOE: dict[str, Any] = {
    **SHAPE,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
GPT2: dict[str, Any] = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "sliding_window": 4}

Make = Callable[[], PreTrainedModel]
PACKING: dict[str, Make] = {
    "gpt2": lambda: tiny_language_model(GPT2Config(**GPT2)),
    "llama": lambda: tiny_language_model(LlamaConfig(**SHAPE)),
    "llama-tied": lambda: tiny_language_model(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen3-moe": lambda: tiny_language_model(Qwen3MoeConfig(**MOE)),
    # Documents longer than its window of 4: a ready mask would widen it.
    "mistral": lambda: tiny_language_model(MistralConfig(**GROUPED)),
    "gemma2-capped": lambda: tiny_language_model(
        Gemma2Config(**GROUPED, head_dim=16, final_logit_softcapping=0.5)
    ),
    "cohere-scaled": lambda: tiny_language_model(CohereConfig(**SHAPE)),
    "granite-scaled": lambda: tiny_language_model(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "phi-bias": lambda: tiny_language_model(PhiConfig(**SHAPE)),
    "gpt-neox": lambda: tiny_language_model(GPTNeoXConfig(**SHAPE)),
}
NOT_PACKING: dict[str, Make] = {
    "mamba": lambda: tiny_language_model(
        MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "opt": lambda: tiny_language_model(
        OPTConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            word_embed_proj_dim=16,
        )
    ),
    "bloom": lambda: tiny_language_model(
        BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2)
    ),
    "falcon": lambda: tiny_language_model(
        FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ),
}
# Those that transformers taught to keep packed documents apart later, with the release.
PACKING_FROM = {"falcon": (5, 24)}
NEVER = (1_000,)
TRANSFORMERS = tuple(int(part) for part in version("transformers").split(".")[:2])
# Three sequences of several documents each, some of one token, and one of a single document.
LENGTHS = [[7, 1, 9, 3], [12], [1, 1, 2, 8, 5]]


def sequences_of(lengths: list[list[int]], *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 60, sum(of_one)).astype(np.uint32) for of_one in lengths]


def one_at_a_time(model: PreTrainedModel) -> Tensor:
    """The model's own logits of every document, end to end."""
    found = []
    with torch.no_grad():
        for ids, of_one in zip(sequences_of(LENGTHS), LENGTHS, strict=True):
            for document in torch.from_numpy(ids.astype(np.int64)).split(of_one):
                found.append(model(document[None], use_cache=False).logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("name", [*PACKING, *NOT_PACKING])
def test_packed_documents_are_as_if_alone(name: str) -> None:
    model = (PACKING | NOT_PACKING)[name]()
    batching = language_model_batching(name, model, max_length=24)
    assert (batching == PACKED) == (
        name in PACKING or PACKING_FROM.get(name, NEVER) <= TRANSFORMERS
    )
    expected = one_at_a_time(model)
    states = final_states(model, sequences_of(LENGTHS), LENGTHS, batching=batching)
    found = head_logits(model, states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3-moe", "mistral"])
def test_rows_say_the_same_as_packed_sequences(name: str) -> None:
    model = PACKING[name]()
    packed, rows = (
        final_states(model, sequences_of(LENGTHS), LENGTHS, batching=batching)
        for batching in (PACKED, PADDED)
    )
    torch.testing.assert_close(packed, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3-moe"])
@pytest.mark.parametrize("batching", [PACKED, PADDED])
def test_no_document_sees_another(name: str, batching: Batching) -> None:
    """Other tokens in one document change the states of that document alone."""
    model = PACKING[name]()
    sequences = sequences_of(LENGTHS)
    before = final_states(model, sequences, LENGTHS, batching=batching)
    changed = [ids.copy() for ids in sequences]
    changed[0][8:17] = 3 + (changed[0][8:17] - 2) % 57  # the third document of the first
    after = final_states(model, changed, LENGTHS, batching=batching)
    differs = (before - after).abs().amax(dim=1) > 1e-6
    assert not differs[:8].any() and not differs[17:].any()
    assert differs[8:17].all()


def test_eager_attention_keeps_documents_apart_too() -> None:
    model = PACKING["llama"]()
    model.set_attn_implementation("eager")
    assert language_model_batching("llama", model, max_length=24)
    states = final_states(model, sequences_of(LENGTHS), LENGTHS, batching=PACKED)
    torch.testing.assert_close(head_logits(model, states), one_at_a_time(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PACKING)
def test_slices_of_the_head_are_the_models_own_logits(name: str) -> None:
    model = PACKING[name]()
    ids = torch.from_numpy(sequences_of([[17]])[0].astype(np.int64))[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
        states = model.base_model(ids, use_cache=False).last_hidden_state[0]
    parts = torch.cat([head_logits(model, states[i : i + 5]) for i in range(0, 17, 5)])
    torch.testing.assert_close(parts, expected, rtol=0, atol=1e-6)
    # The model is as it was.
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits[0], expected)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2-capped", "phi-bias"])
def test_the_head_of_a_half_precision_model_is_in_float32(name: str) -> None:
    model = on_device(PACKING[name]().bfloat16(), CPU)
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    assert (head.weight.dtype, table.weight.dtype) == (torch.float32, torch.bfloat16)
    states = final_states(model, sequences_of(LENGTHS), LENGTHS, batching=PACKED)
    assert states.dtype == torch.bfloat16
    logits = head_logits(model, states)
    assert (logits.bfloat16().float() != logits).any()
    expected = states.float() @ head.weight.T
    if name == "phi-bias":
        expected += head.bias
    if name == "gemma2-capped":
        expected = torch.tanh(expected / 0.5) * 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, one_at_a_time(model), rtol=0, atol=0.05)


def test_a_shared_weight_is_shared_still_in_float32() -> None:
    model = on_device(PACKING["llama-tied"](), CPU)
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    assert head.weight is table.weight


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny_language_model(BertConfig(**SHAPE))  # an encoder, by its configuration
    with pytest.raises(UserError, match=r"looks at later tokens.*causal language model"):
        language_model_batching("it", model, max_length=24)


def test_a_head_that_reads_more_than_the_last_states_is_refused() -> None:
    model: Any = PACKING["llama"]()
    own = model.forward

    def with_embeddings(input_ids: Any = None, **given: Any) -> Any:
        output = own(input_ids, **given)
        if input_ids is not None:
            output.logits = (
                output.logits + model.get_input_embeddings()(input_ids).sum(-1)[..., None]
            )
        return output

    model.forward = with_embeddings
    with pytest.raises(UserError, match="are not those of its head"):
        language_model_batching("it", model, max_length=24)


def load(folder: Path, **changes: Any) -> LanguageModelTeacher:
    given = {"teacher": str(folder), "device": "cpu"} | changes
    return load_language_model(TeacherConfig.model_validate(given))


def test_what_is_known_of_a_language_model(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = write_tiny_language_model(tmp_path / "a", gpt2_tokenizer)
    teacher = load(folder)
    assert teacher.batching == PACKED and teacher.num_logits == len(gpt2_tokenizer)
    assert (teacher.max_length(None), teacher.max_length(300)) == (512, 300)
    assert not teacher.model.training
    known = identity(teacher, "")
    assert known["architecture"] == "GPT2LMHeadModel" and len(known["weights_sha256"]) == 64
    half = load(folder, dtype="bfloat16")
    kept = {"float32_parts": "as transformers keeps them"}
    assert identity(half, "") == {**known, **kept, "dtype": "bfloat16"}
    other = load(write_tiny_language_model(tmp_path / "b", gpt2_tokenizer, seed=1))
    assert identity(other, "")["weights_sha256"] != known["weights_sha256"]
    assert identity(other, "")["config_sha256"] == known["config_sha256"]


def test_a_model_that_does_not_pack_is_told_of(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    model = NOT_PACKING["opt"]()
    model.save_pretrained(tmp_path)
    gpt2_tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="teacher_cache"):
        assert load(tmp_path).batching == PADDED
    assert "OPTForCausalLM) does not keep documents apart" in caplog.text
    assert "each document runs as a row of its own (" in caplog.text
    assert "times as long when it was measured)" in caplog.text


def test_untrained_weights_and_missing_models_are_refused(
    tmp_path: Path, tiny_bert: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=r"no trained weights for cls.*causal language model"):
        load(tiny_bert)
    gpt2_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the language model '.*' could not be loaded"):
        load(tmp_path)


def test_the_library_finds_it_again(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Loaded through this package and through transformers, the logits are the same."""
    folder = write_tiny_language_model(tmp_path, gpt2_tokenizer)
    teacher = load(folder)
    fresh = AutoModelForCausalLM.from_pretrained(folder).eval()
    states = final_states(teacher.model, sequences_of(LENGTHS), LENGTHS, batching=PACKED)
    torch.testing.assert_close(
        head_logits(teacher.model, states), one_at_a_time(fresh), rtol=0, atol=1e-5
    )
