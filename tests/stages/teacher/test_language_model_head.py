"""The complete head of a causal language model: found, checked, stored, read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.fingerprint import hash_files
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.measure import reconstruction_error
from teacher_cache.stages.models.batching import PACKED
from teacher_cache.stages.models.causal import final_states
from teacher_cache.stages.models.head import (
    HEAD_FILE,
    LanguageModelHead,
    check_head,
    read_language_model_head,
)
from teacher_cache.stages.tokens.support import Support
from tests.small_caches import make_manifest

NUM_IDS, WIDTH = 97, 32
SHAPE: dict[str, Any] = {
    "vocab_size": NUM_IDS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=NUM_IDS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
}
EXPECTED = {"gemma2": (1.0, 2.0), "cohere": (0.3, None), "granite": (1 / 3, None)}

Run = tuple[PreTrainedModel, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest) -> Run:
    """A model with logits of a few nats, its states [N, D] and logits [N, R]."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    layer = model.get_output_embeddings()
    assert isinstance(layer, torch.nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * 0.5)
    ids = torch.randint(NUM_IDS, (2, 11))
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        states = final_states(model, list(ids.numpy()), [[11], [11]], batching=PACKED)
    return model, states, logits.reshape(-1, NUM_IDS)


def test_states_and_head_give_the_teachers_logits(run: Run) -> None:
    model, states, logits = run
    head = LanguageModelHead.of(model)
    scale, soft_cap = EXPECTED.get(model.config.model_type, (1.0, None))
    assert (head.scale, head.soft_cap) == (pytest.approx(scale), soft_cap)
    torch.testing.assert_close(head(states), logits, rtol=1e-5, atol=1e-5)
    apart = check_head(head, states, logits)
    assert 0 < apart < 0.02
    assert apart == float((head(states.half()) - logits).abs().max())


def test_a_head_that_lacks_something_is_refused(run: Run) -> None:
    model, states, logits = run
    head = LanguageModelHead.of(model)
    lacking = [
        replace(head, scale=head.scale * 1.1),
        replace(head, soft_cap=3.0 if head.soft_cap is None else None),
        replace(head, bias=torch.linspace(-0.2, 0.2, NUM_IDS)),
    ]
    for wrong in lacking:
        with pytest.raises(UserError, match=r"logits differ by up to .* use --codec topk"):
            check_head(wrong, states, logits)
    with pytest.raises(UserError, match="differ by up to"):
        check_head(head, states * torch.nan, logits)


def test_hidden_states_through_the_codec(run: Run) -> None:
    model, states, logits = run
    support = Support.of(set(range(90)) - {4}, NUM_IDS)
    head = LanguageModelHead.of(model).of_support(support)
    codec = HiddenCodec(support_size=90, width=WIDTH, head=head)
    next_ids = torch.arange(len(logits))
    reduced, unused = reduce_positions(codec, support, logits, next_ids, states=states)
    assert (unused > 0).all()
    masked = logits.double()[:, :90].clone()
    masked[:, 4] = -torch.inf
    exact = torch.log_softmax(masked, dim=1)
    taken = exact.gather(1, next_ids[:, None])[:, 0]
    np.testing.assert_allclose(reduced.next_log_prob, taken.numpy(), rtol=1e-5)
    error = reconstruction_error(codec, support, logits, temperature=1.5, states=states)
    assert 0 < error.kl < 1e-5
    stored = {"hidden": torch.from_numpy(codec.encode(reduced)["hidden"])}  # pyright: ignore
    with torch.inference_mode():
        decoded = codec.decode(stored, 1.0)
    assert torch.isneginf(decoded.log_probs[:, 4]).all()
    finite = ~torch.isneginf(exact)
    torch.testing.assert_close(decoded.log_probs[finite].double(), exact[finite], rtol=0, atol=0.03)


def _written(head: LanguageModelHead, cache: Path) -> Manifest:
    head.write(cache / TEACHER_FOLDER)
    files = hash_files(cache / TEACHER_FOLDER)
    return replace(make_manifest({}), teacher_files=files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_full", [True, False])
def test_written_and_read_back_without_loss(
    tmp_path: Path, dtype: torch.dtype, is_full: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=generator).to(dtype)
    head = LanguageModelHead(weight=weight)
    if is_full:
        head = replace(head, bias=weight[:, 0], scale=1 / 3, soft_cap=30.0, unused=(2, 5))
    for folder in ("one", "two"):
        manifest = _written(head, tmp_path / folder)
    path = tmp_path / "two" / TEACHER_FOLDER / HEAD_FILE
    assert path.read_bytes() == (tmp_path / "one" / TEACHER_FOLDER / HEAD_FILE).read_bytes()
    found = read_language_model_head(tmp_path / "two", manifest)
    assert found.weight.dtype.itemsize == dtype.itemsize
    assert torch.equal(found.weight.float(), weight.float())
    assert (found.scale, found.soft_cap, found.unused) == (head.scale, head.soft_cap, head.unused)
    states = torch.randn(3, 4, generator=generator)
    assert torch.equal(found(states), head(states))
    assert torch.equal(found.to("cpu")(states), head(states))
    assert torch.isneginf(found(states)).sum() == 3 * len(head.unused)
    assert found.facts()["has_bias"] == is_full


def test_a_missing_or_damaged_head_is_refused(tmp_path: Path) -> None:
    manifest = _written(LanguageModelHead(weight=torch.ones(3, 2)), tmp_path)
    with pytest.raises(UserError, match="holds no language-model head"):
        read_language_model_head(tmp_path, make_manifest({}))
    path = tmp_path / TEACHER_FOLDER / HEAD_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckFailed, match="differs from its SHA-256"):
        read_language_model_head(tmp_path, manifest)


def test_a_model_whose_output_is_not_linear_is_refused() -> None:
    model = MODELS["llama"]()
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(WIDTH, NUM_IDS)))
    with pytest.raises(UserError, match="LlamaForCausalLM has no linear output layer"):
        LanguageModelHead.of(model)
