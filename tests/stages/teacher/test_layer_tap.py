"""What is heard of a teacher's layers, against transformers' own outputs of one document alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from teacher_cache.cache.codecs.attention import row_kl
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models import inference
from teacher_cache.stages.models.batching import PACKED, PADDED, Batching
from teacher_cache.stages.models.causal import final_states
from teacher_cache.stages.teacher.config import LayersConfig, TeacherConfig
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.layers import (
    KeptLayers,
    LayerPlan,
    LayerTap,
    find_attention,
    half,
)
from teacher_cache.stages.teacher.load import load_teacher

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SHAPE))


def roberta() -> Any:
    return RobertaForSequenceClassification(RobertaConfig(**SHAPE))


def albert() -> Any:  # one module for all layers
    return AlbertForSequenceClassification(AlbertConfig(**SHAPE, embedding_size=16))


def distilbert() -> Any:
    config = DistilBertConfig(
        vocab_size=60, dim=32, n_layers=3, n_heads=2, hidden_dim=64, pad_token_id=0
    )
    return DistilBertForSequenceClassification(config)


def gpt2() -> Any:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=2, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def gpt2_lm() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=2))


def llama_lm() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1))


def teacher_of(make: Callable[[], PreTrainedModel]) -> Any:
    """What is asked of a teacher, with ids for a tokenizer's."""
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # rows of maps that differ
    ids = [2, *range(5, 14), 3]
    tokenizer = lambda _: {"input_ids": ids}  # noqa: E731
    return SimpleNamespace(
        name="tiny",
        model=model,
        device=torch.device("cpu"),
        tokenizer=_Tokenizer(tokenizer),
        pad_id=0,
        batching=PADDED,
        id2label={0: "a", 1: "b"},
    )


class _Tokenizer:
    cls_token_id = 2

    def __init__(self, call: Callable[[str], dict[str, list[int]]]):
        self._call = call

    def __call__(self, text: str) -> dict[str, list[int]]:
        return self._call(text)


def planned(teacher: Any, *, task: str = "classification", **asked: object) -> LayerPlan:
    config = LayersConfig.model_validate(asked)
    return LayerPlan.prepared(config, teacher, is_packed=task == "lm")


def documents(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(4, 60, length).astype(np.uint32) for length in lengths]


def said_of(model: Any, ids: np.ndarray) -> Any:
    with torch.no_grad():
        given = torch.from_numpy(ids.astype(np.int64))[None]
        return model.base_model(input_ids=given, output_attentions=True, output_hidden_states=True)


def behind_layer(model: Any, layer: int, ids: np.ndarray) -> np.ndarray:
    found: list[torch.Tensor] = []
    module = model.base_model.h[layer]
    hook = module.register_forward_hook(
        lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    said_of(model, ids)
    hook.remove()
    return found[0][0].numpy()


def heard(teacher: Any, plan: LayerPlan, ids: list[np.ndarray]) -> dict[str, Any]:
    kept = KeptLayers(plan)
    tap = LayerTap(teacher.model, plan, kept)
    run_teacher(teacher, ids, batch_tokens=40, pooled_width=None, tap=tap)
    return kept.fields(len(ids))


CLASSIFIERS = [bert, roberta, albert, distilbert, gpt2]


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_maps_and_states_of_a_batch_are_those_of_each_sample_alone(make: Callable[[], Any]) -> None:
    teacher = teacher_of(make)
    ids = documents(3, 12, 1, 7, 12, 5)
    by_mode: dict[str, dict[str, Any]] = {
        mode: heard(
            teacher,
            plan := planned(teacher, attention=mode, attention_layers="all", hidden="last,0,2"),
            ids,
        )
        | {"plan": plan}
        for mode in ("cls", "mean", "full")
    }
    is_causal = make is gpt2
    for place, one in enumerate(ids):
        said = said_of(teacher.model, one)
        for layer in range(3):
            exact = said.attentions[layer][0].numpy()
            row = exact.mean(0)[-1 if is_causal else 0]
            for mode, wanted in {"cls": row, "mean": exact.mean(0), "full": exact}.items():
                codec = by_mode[mode]["plan"].attention
                assert codec.is_causal == is_causal and codec.num_heads == 2
                stored = by_mode[mode][f"attention_{layer}"][place]
                decoded = codec.decode(stored, len(one))
                assert row_kl(wanted, decoded).max() < 1e-3
        last = said.last_hidden_state[0].numpy()
        # What the model gives of its last layer stands behind its final norm, where it has one.
        behind = behind_layer(teacher.model, 2, one) if is_causal else last
        for name, states in (("hidden", last), ("hidden_2", behind),
                             ("hidden_0", said.hidden_states[1][0].numpy())):  # fmt: skip
            found = by_mode["mean"][name][place]
            assert found.dtype == np.float16
            np.testing.assert_allclose(found, states, rtol=2e-3, atol=2e-3)


def test_only_what_is_asked_for_is_kept() -> None:
    teacher = teacher_of(bert)
    fields = heard(teacher, planned(teacher, attention="mean"), documents(4, 6))
    assert list(fields) == ["attention_2"]
    assert [len(fields["attention_2"][i]) for i in range(2)] == [16, 36]
    assert list(heard(teacher, planned(teacher, hidden="1"), documents(4))) == ["hidden_1"]
    assert heard(teacher, planned(teacher), documents(4)) == {}


def test_hooks_are_gone_afterwards_and_logits_are_the_same() -> None:
    teacher = teacher_of(bert)
    ids = documents(4, 6)
    plan = planned(teacher, attention="mean", hidden="last")
    told: list[str] = []
    tap = LayerTap(teacher.model, plan, lambda name, *_: told.append(name))
    plain = run_teacher(teacher, ids, batch_tokens=40, pooled_width=None).vectors
    listened = run_teacher(teacher, ids, batch_tokens=40, pooled_width=None, tap=tap).vectors
    assert np.array_equal(plain["class_logits"], listened["class_logits"])
    assert sorted(told) == ["attention_2", "attention_2", "hidden", "hidden"]
    run_teacher(teacher, ids, batch_tokens=40, pooled_width=None)
    assert len(told) == 4


def test_a_batch_that_ran_out_of_memory_is_heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(bert)
    ids = documents(5, 5, 5, 5)
    plan = planned(teacher, attention="full", hidden="0")
    whole = heard(teacher, plan, ids)
    forward = inference.forward

    def short_of_memory(model: Any, input_ids: Any, *rest: Any) -> Any:
        found = forward(model, input_ids, *rest)  # the layers were heard before it fails
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr("teacher_cache.stages.teacher.forward.forward", short_of_memory)
    halved = heard(teacher, plan, ids)
    for name, field in whole.items():
        assert len(halved[name]) == 4
        np.testing.assert_allclose(
            halved[name].values.astype(float), field.values.astype(float), atol=1.01
        )


@pytest.mark.parametrize("make", [gpt2_lm, llama_lm])
@pytest.mark.parametrize("batching", [PACKED, PADDED])
def test_maps_of_packed_documents_are_those_of_each_alone(
    make: Callable[[], Any], batching: Batching
) -> None:
    teacher = teacher_of(make)
    plan = planned(teacher, task="lm", attention="full", attention_layers="0,2", hidden="last,1")
    pieces = [documents(4, 1, 7), documents(9), documents(2, 5)]
    sequences = [np.concatenate(of_one) for of_one in pieces]
    lengths = [[len(one) for one in of_one] for of_one in pieces]
    kept = KeptLayers(plan)
    with LayerTap(teacher.model, plan, kept) as tap:
        states = final_states(
            teacher.model, sequences, lengths, batching=batching, tap=tap, sample_idxs=[0, 1, 2]
        )
    fields = kept.fields(3)
    codec = plan.attention
    assert codec is not None and codec.is_causal and codec.is_packed
    kept_states: Any = fields["hidden"]
    np.testing.assert_allclose(kept_states.values, states.numpy(), rtol=2e-3, atol=2e-3)
    for sample, of_one in enumerate(pieces):
        for layer in (0, 2):
            stored: Any = fields[f"attention_{layer}"]
            parts = codec.split(stored[sample], lengths[sample])
            assert [len(one) for one in parts] == [n * (n + 1) // 2 for n in lengths[sample]]
            for ids, part in zip(of_one, parts, strict=True):
                exact = said_of(teacher.model, ids).attentions[layer][0].numpy()
                assert row_kl(exact, codec.decode(part, len(ids))).max() < 1e-3
        joined: Any = fields["hidden_1"]
        alone = [said_of(teacher.model, ids).hidden_states[2][0] for ids in of_one]
        np.testing.assert_allclose(joined[sample], torch.cat(alone), rtol=2e-3, atol=2e-3)


def test_layers_between_those_with_maps_are_counted() -> None:
    config = JambaConfig(
        **SHAPE, num_key_value_heads=1, attn_layer_period=3, attn_layer_offset=1, num_experts=1
    )
    assert find_attention(teacher_of(lambda: JambaForCausalLM(config))).layers == (1,)


def test_teachers_without_maps_are_refused() -> None:
    mamba = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"tiny \(MambaForCausalLM\) gives no attention maps"):
        find_attention(teacher_of(lambda: MambaForCausalLM(mamba)))
    bart = BartConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32, eos_token_id=3,
    )  # fmt: skip
    with pytest.raises(UserError, match="gives no attention maps"):
        find_attention(teacher_of(lambda: BartForSequenceClassification(bart)))


def test_a_bidirectional_teacher_without_a_cls_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Tokenizer, "cls_token_id", None)
    with pytest.raises(UserError, match=r"no text with a \[CLS\] token: give --attention mean"):
        planned(teacher_of(bert), attention="cls")
    assert planned(teacher_of(gpt2), attention="cls").attention is not None
    monkeypatch.setattr(_Tokenizer, "cls_token_id", 3)  # at the end, as XLNet's
    codec = planned(teacher_of(bert), attention="cls").attention
    assert codec is not None and codec.pooled_at == "last"


def test_states_beyond_half_precision() -> None:
    assert half(np.full((2, 3), 65504.0, np.float32), what="states", option="-").max() == 65504
    for wrong in (1e6, np.nan):
        states = np.array([[1.0, 2.0], [wrong, 0.0]], np.float32)
        with pytest.raises(UserError, match=r"1 of the teacher's states .* without --hidden last"):
            half(states, what="states", option="--hidden last")


def test_the_attention_that_forms_maps_is_loaded_only_for_them(tiny_bert: Path) -> None:
    config = TeacherConfig(teacher=str(tiny_bert), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, mapped = load_teacher(config), load_teacher(config, with_attention=True)
        plan = planned(mapped, attention="mean")
        heard(mapped, plan, documents(4, 6))
    assert plain.model.config._attn_implementation == "sdpa"
    assert mapped.model.config._attn_implementation == "eager"
    assert plain.config_sha256 == mapped.config_sha256
    assert plan.settings()["attention"]["implementation"] == "eager"
