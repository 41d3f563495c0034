"""Weights to and from transformers' Mamba classes: the same function, the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    PreTrainedModel,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.device import recurrences_by_device
from teacher_cache.stages.student import MambaStudentForCausalLM, MambaStudentModel
from teacher_cache.stages.student.interchange import from_transformers, to_transformers
from tests.tiny_students import small_config, small_student

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 5,
    "expand": 3,
    "conv_kernel": 3,
    "layer_norm_epsilon": 1e-3,
    "pad_token_id": 7,
    "eos_token_id": [1, 2],
}
CONFIGS: dict[str, Any] = {
    "mamba": (MambaConfig, {"time_step_rank": 3}),
    "mamba2": (Mamba2Config, {"num_heads": 4, "head_dim": 12, "n_groups": 2, "chunk_size": 4}),
}
CLASSES: dict[str, Any] = {
    "mamba": (MambaModel, MambaForCausalLM),
    "mamba2": (Mamba2Model, Mamba2ForCausalLM),
}
BOTH = pytest.mark.parametrize("arch", ["mamba", "mamba2"])


def theirs(arch: str, *, head: bool = True, **changes: Any) -> Any:
    """A small model of transformers in which no weight has a value of its own kind."""
    torch.manual_seed(0)
    config_class, sizes = CONFIGS[arch]
    model = CLASSES[arch][head](config_class(**(SIZES | sizes | changes)))
    return randomised(recurrences_by_device(model))


def ours(*, head: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = small_config(norm_epsilon=1e-3, chunk_size=4, ngroups=2, **changes)
    return randomised((MambaStudentForCausalLM if head else MambaStudentModel)(config))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """transformers rounds to float32 within, whatever the weights are; here it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def assert_same_function(transformers_model: Any, student: Any, *, head: bool) -> None:
    field = "logits" if head else "last_hidden_state"
    ids = torch.randint(0, 50, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # on the left
    single = transformers_model(ids, attention_mask=mask)[field]
    torch.testing.assert_close(
        student(ids, attention_mask=mask)[field][mask.bool()],
        single[mask.bool()],
        rtol=2e-5,
        atol=2e-5,
    )
    transformers_model.double()
    with float32_is_float64():
        expected = transformers_model(ids, attention_mask=mask)[field]
    transformers_model.float()
    assert expected.dtype == torch.float64 and expected.std() > 0.1
    got = student.double()(ids, attention_mask=mask)[field]
    student.float()
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-10)


def assert_same_bits(left: PreTrainedModel, right: PreTrainedModel) -> None:
    expected, found = left.state_dict(), right.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
        assert found[name].data_ptr() != tensor.data_ptr()


@BOTH
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_transformers_weights_computes_the_same(arch, head, tied) -> None:
    model = theirs(arch, head=head, tie_word_embeddings=tied)
    student = from_transformers(model)
    assert isinstance(student, MambaStudentForCausalLM if head else MambaStudentModel)
    assert_same_function(model, student, head=head)
    back = to_transformers(student)
    assert type(back) is type(model)
    assert_same_bits(model, back)
    kept = {name: value for name, value in model.config.to_dict().items() if name != "dtype"}
    again = back.config.to_dict()
    assert {name for name in kept if again[name] != kept[name]} <= {"architectures"}


@BOTH
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_with_a_students_weights_computes_the_same(arch, head, tied) -> None:
    student = ours(arch=arch, head=head, tie_word_embeddings=tied)
    model = to_transformers(student)
    assert_same_function(model, student, head=head)
    back: Any = from_transformers(model)
    assert_same_bits(student, back)
    assert back.config.resolved_dt_rank == student.config.resolved_dt_rank
    if head:
        assert (back.lm_head.weight is back.backbone.embedding.weight) == tied


@BOTH
def test_moves_dtypes_mode_marks_and_generation_settings_and_no_random_state(arch) -> None:
    model = theirs(arch).bfloat16()
    for layer in model.backbone.layers:
        layer.mixer.A_log.data = layer.mixer.A_log.data.float()
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=True)
    state = torch.get_rng_state()
    student = from_transformers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not student.training and from_transformers(model.train()).training
    assert student.dtype == torch.bfloat16
    for layer in student.backbone.layers:
        assert layer.mixer.A_log.dtype == torch.float32
    assert student.generation_config.max_new_tokens == 3
    assert_same_bits(model, to_transformers(student))


@BOTH
def test_greedy_generation_is_the_same(arch) -> None:
    model = theirs(arch, eos_token_id=None)
    ids = torch.randint(0, 50, (1, 5))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    student: Any = from_transformers(model)
    assert torch.equal(student.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("mamba", {"use_bias": True}, "has use_bias True, where a student can only have False"),
        ("mamba2", {"use_bias": True}, "has use_bias True"),
        ("mamba", {"use_conv_bias": False}, "has use_conv_bias False"),
        ("mamba2", {"use_conv_bias": False}, "has use_conv_bias False"),
        ("mamba", {"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ("mamba2", {"hidden_act": "relu"}, "has hidden_act 'relu'"),
        ("mamba", {"residual_in_fp32": False}, "has residual_in_fp32 False"),
        ("mamba2", {"residual_in_fp32": False}, "has residual_in_fp32 False"),
        ("mamba2", {"time_step_limit": (0.0, 0.1)}, r"has time_step_limit \(0.0, 0.1\)"),
        ("mamba2", {"time_step_limit": [0.01, math.inf]}, r"has time_step_limit \(0.01, inf\)"),
        ("mamba", {"conv_kernel": 1}, "d_conv is 1"),
    ],
)
def test_refuses_what_a_student_has_not(arch, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        from_transformers(theirs(arch, **changes))


def test_refuses_other_classes() -> None:
    tiny: dict[str, Any] = {
        "vocab_size": 9,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
    }
    bert: Any = BertModel(BertConfig(**tiny, intermediate_size=8))
    with pytest.raises(UserError, match="weights of a BertModel: give one of MambaModel, Mamba"):
        from_transformers(bert)
    classifier: Any = small_student()
    with pytest.raises(UserError, match="no counterpart of a MambaStudentForSequenceClass"):
        to_transformers(classifier)
    assert isinstance(to_transformers(classifier.backbone), Mamba2Model)


def test_refuses_a_bidirectional_student() -> None:
    with pytest.raises(UserError, match="transformers has no bidirectional mixers"):
        to_transformers(ours(head=False, bidirectional=True))


def test_refuses_weights_that_do_not_fit_their_configuration() -> None:
    model = theirs("mamba2")
    model.backbone.layers[0].mixer.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UserError, match=r"has no place for backbone.layers.0.mixer.extra: weights"):
        from_transformers(model)
    model = theirs("mamba2")
    model.lm_head = None
    with pytest.raises(UserError, match=r"lacks lm_head.weight: weights"):
        from_transformers(model)
    model = theirs("mamba2")
    model.config.vocab_size = 51
    with pytest.raises(UserError, match=r"shape \[50, 16\], but its sizes call for \[51, 16\]"):
        from_transformers(model)
    model = theirs("mamba2", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    with pytest.raises(UserError, match=r"lm_head.weight is tied to .*, but the two differ"):
        from_transformers(model)
