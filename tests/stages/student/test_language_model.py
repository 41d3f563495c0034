"""The language model: decoding step by step, generation, loss, files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import MambaStudentForCausalLM
from tests.tiny_students import small_config

BOTH = pytest.mark.parametrize("arch", ["mamba", "mamba2"])


def language_model(**changes: Any) -> MambaStudentForCausalLM:
    torch.manual_seed(0)
    model = MambaStudentForCausalLM(small_config(**changes)).eval()
    for parameter in model.parameters():  # wide enough logits that no greedy choice is a tie
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def greedy(model: MambaStudentForCausalLM, ids: Tensor, num_tokens: int) -> Tensor:
    for _ in range(num_tokens):
        token = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
    return ids


@BOTH
@pytest.mark.parametrize("name", ["cache", "cache_params"])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (7,), (2, 9), (11,)])
def test_going_on_from_a_state_equals_reading_it_all(arch, cuts, name) -> None:
    model = language_model(arch=arch, chunk_size=4).double()
    ids = torch.randint(0, 50, (2, 12))
    expected = model(ids, use_cache=False).logits
    cache, outputs = None, []
    for start, end in zip((0, *cuts), (*cuts, 12), strict=True):
        output = model(ids[:, start:end], **{name: cache}, use_cache=True)
        cache = getattr(output, name)
        assert name in output and output[name] is cache
        outputs.append(output.logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-10)


def test_a_state_is_given_by_one_of_its_names() -> None:
    model = language_model()
    ids = torch.zeros(1, 3, dtype=torch.long)
    state = model(ids, use_cache=True).cache
    for called in (model, model.backbone):
        with pytest.raises(ValueError, match="names of one thing"):
            called(ids, cache=state, cache_params=state)


@BOTH
def test_an_output_without_a_state_has_it_under_neither_name(arch) -> None:
    output = language_model(arch=arch)(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    for name in ("cache", "cache_params"):
        assert getattr(output, name) is None and name not in output
    assert len(output.to_tuple()) == 1 and output[0] is output.logits


@BOTH
def test_the_state_has_one_size_at_any_length(arch) -> None:
    model = language_model(arch=arch)
    sizes = set()
    for length in (1, 5, 40):
        layers = model(torch.zeros(1, length, dtype=torch.long)).cache_params.layers
        sizes.add(
            tuple((layer.conv_states[0].shape, layer.recurrent_states[0].shape) for layer in layers)
        )
    assert len(sizes) == 1


@BOTH
@pytest.mark.parametrize("left", [0, 3])
def test_generates_what_reading_it_all_chooses(arch, left) -> None:
    model: Any = language_model(arch=arch)
    ids = torch.randint(1, 50, (2, 6))
    padded = torch.nn.functional.pad(ids, (left, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 0))
    got: Any = model.generate(
        padded, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    assert torch.equal(got[:, left:], greedy(model, ids, 9))


@BOTH
def test_beam_search_reorders_the_states(arch) -> None:
    model: Any = language_model(arch=arch)
    ids = torch.randint(1, 50, (2, 4))
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    with_state = model.generate(ids, pad_token_id=0, **settings)
    without = model.generate(ids, pad_token_id=0, use_cache=False, **settings)
    assert torch.equal(with_state, without)


def test_the_loss_is_the_mean_over_the_next_tokens() -> None:
    model = language_model()
    ids = torch.randint(0, 50, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    seq_idx = torch.tensor([[0] * 9, [0] * 5 + [1] * 4])
    log_probs = model(ids, seq_idx=seq_idx).logits.log_softmax(-1)
    counted = [(0, t) for t in range(3, 8)] + [(1, t) for t in range(8) if t != 4]
    expected = -torch.stack([log_probs[b, t, ids[b, t + 1]] for b, t in counted]).mean()
    torch.testing.assert_close(model(ids, labels=labels, seq_idx=seq_idx).loss, expected)


def test_only_the_asked_positions_get_logits() -> None:
    model = language_model()
    ids = torch.randint(0, 50, (2, 9))
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    chosen = torch.tensor([1, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, whole[:, chosen])


@BOTH
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_generates_in_a_pipeline(arch, tied, tmp_path, gpt2_tokenizer) -> None:
    model = language_model(
        arch=arch, vocab_size=len(gpt2_tokenizer), tie_word_embeddings=tied, pad_token_id=50256
    )
    model.save_pretrained(tmp_path)
    gpt2_tokenizer.save_pretrained(tmp_path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MambaStudentForCausalLM)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied
    pipe: Any = transformers.pipeline("text-generation", model=str(tmp_path))
    text = "A good film"
    answer = pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = torch.tensor([gpt2_tokenizer(text)["input_ids"]])
    assert answer == gpt2_tokenizer.decode(greedy(model, ids, 5)[0])


def test_refuses_both_directions() -> None:
    with pytest.raises(UserError, match="cannot be a language model"):
        language_model(bidirectional=True)
