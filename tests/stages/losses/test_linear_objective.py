"""The chunked objective against the one on all logits at once: terms, both gradients, memory."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution
from teacher_cache.stages.losses.draws import SampledTargets, WeightedTargets
from teacher_cache.stages.losses.linear_head import linear_objective
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    confidence_weights,
    distillation_objective,
)
from tests.largest_tensor import LargestTensor
from tests.sparse_teachers import top_k


def make_inputs(
    num: int, width: int, vocab: int, seed: int, config: ObjectiveConfig, kind: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """States, head, and all other arguments, of a step that holds another batch of the kind too."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(num, vocab, generator=generator, dtype=torch.float64)
    has_teacher = torch.rand(num, generator=generator) < 0.8
    top1 = torch.log_softmax(teacher, dim=-1).amax(dim=-1)
    power = config.conf_power
    own = StepTotals.of(
        int(has_teacher.sum()),
        labeled=True,
        num_labels=num,
        conf_weights=confidence_weights(top1[has_teacher], power) if power else None,
    )
    sparse = top_k(teacher, 2, config.temperature)
    assert sparse.head_ids is not None
    targets: Any = sparse
    if kind == "dense":
        targets = TeacherDistribution.from_logits(teacher, config.temperature)
    elif kind == "sampled":
        targets = SampledTargets(
            ids=sparse.head_ids,
            counts=torch.tensor([2, 1]).expand(num, 2),
            log_probs=sparse.log_probs,
            proposal_log_probs=sparse.log_probs,
            temperature=config.temperature,
            support_size=vocab,
        )
    elif kind == "distinct":
        targets = WeightedTargets(
            ids=sparse.head_ids,
            log_probs=sparse.log_probs,
            shares=sparse.log_probs.exp() * torch.tensor([1.0, 2.5], dtype=torch.float64),
            num_heads=torch.ones(num, dtype=torch.long),
            head=sparse,
        )
    others = {
        "targets": targets,
        "labels": torch.randint(vocab, (num,), generator=generator),
        "config": config,
        "totals": own + own,
        "top1_log_prob": top1,
        "has_teacher": has_teacher,
    }
    return hidden, weight, others


def plain(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    **others: Any,
) -> ObjectiveTerms:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return distillation_objective(logits, **others)


def results(
    function: Any, hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, **others: Any
) -> dict[str, Any]:
    """Every term, and the gradients of all inputs, of 0.3 times the loss."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    if bias is not None:
        bias = others["bias"] = bias.clone().requires_grad_()
    terms = function(*leaves, **others)
    (0.3 * terms.loss).backward()
    found = {one.name: getattr(terms, one.name) for one in fields(terms)}
    found["loss"] = terms.loss.detach()
    found |= {"hidden": leaves[0].grad, "weight": leaves[1].grad}
    return found if bias is None else found | {"bias": bias.grad}


@settings(max_examples=40)
@given(
    num=st.integers(0, 12),
    vocab=st.integers(2, 9),
    max_logits=st.integers(1, 120),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["dense", "sparse", "sampled", "distinct"]),
    name=st.sampled_from(["kl", "jsd"]),
    conf_power=st.sampled_from([0.0, 1.0]),
    has_bias=st.booleans(),
    soft_cap=st.sampled_from([None, 1.5]),
)
def test_any_chunks_give_the_same_terms_and_gradients(
    num: int,
    vocab: int,
    max_logits: int,
    seed: int,
    kind: str,
    name: Any,
    conf_power: float,
    has_bias: bool,
    soft_cap: float | None,
) -> None:
    config = ObjectiveConfig(divergence=name, conf_power=conf_power, label_smoothing=0.1)
    hidden, weight, others = make_inputs(num, 4, vocab, seed, config, kind)
    others["soft_cap"] = soft_cap
    if has_bias:
        others["bias"] = torch.linspace(-1, 2, vocab, dtype=torch.float64)
    found = results(linear_objective, hidden, weight, max_logits=max_logits, **others)
    expected = results(plain, hidden, weight, **others)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-10)


def test_only_what_is_needed() -> None:
    config = ObjectiveConfig()
    hidden, weight, others = make_inputs(9, 4, 7, 0, config, "sparse")
    expected = results(plain, hidden, weight, **others)
    with torch.no_grad():
        loss = linear_objective(hidden.requires_grad_(), weight, **others).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected["loss"])
    terms = linear_objective(hidden, weight, **others)
    (0.3 * terms.loss).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected["hidden"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = linear_objective(hidden, weight, **others)
    assert torch.equal(again.loss, terms.loss)


def test_no_tensor_is_larger_than_a_chunk() -> None:
    num, vocab = 200, 500
    hidden, weight, others = make_inputs(num, 4, vocab, 0, ObjectiveConfig(), "sparse")
    with LargestTensor() as plainly:
        results(plain, hidden, weight, **others)
    assert plainly.num_elements >= num * vocab
    with LargestTensor() as chunked:
        results(linear_objective, hidden, weight, max_logits=6 * vocab, **others)
    assert chunked.num_elements <= 6 * (vocab + 1)


def test_refuses_what_does_not_fit() -> None:
    hidden, weight, others = make_inputs(9, 4, 7, 0, ObjectiveConfig(), "sparse")
    with pytest.raises(ValueError, match=r"are not \[N, D\] and \[V, D\]"):
        linear_objective(hidden, weight[:, :3], **others)
    with pytest.raises(ValueError, match="for 7 outcomes"):
        linear_objective(hidden, weight, bias=weight[:6, 0], **others)
    others["totals"] = StepTotals(num_labeled=2)
    with pytest.raises(ValueError, match="in a step that counts 2"):
        linear_objective(hidden, weight, max_logits=7, **others)
