"""Reduced values of every position, against the model's own logits of one document at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import PackedSample, pack
from teacher_cache.stages.models.batching import PACKED, PADDED, Batching
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.forward import (
    PositionOutputs,
    Slice,
    run_positions,
)
from teacher_cache.stages.teacher.load import LanguageModelTeacher, load_language_model
from tests.tiny_models import write_tiny_language_model

TEXTS = [
    "A fine film.",
    "汉字 \U0001f9e1",
    "",
    "It was long, " * 30,
    "Dull.",
    "x",
    "So so, but " * 9,
]


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> LanguageModelTeacher:
    folder = write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), gpt2_tokenizer)
    return load_language_model(TeacherConfig(teacher=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def samples(gpt2_tokenizer: PreTrainedTokenizerBase) -> list[PackedSample]:
    documents = [Document(text, "test", "train", idx) for idx, text in enumerate(TEXTS)]
    return pack(documents, gpt2_tokenizer, max_length=48).samples


class Named(dict[str, np.ndarray]):
    """Values of positions by name."""

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, str):
            return super().__getitem__(where)
        return Named({name: value[where] for name, value in self.items()})


def reduced(part: Slice) -> Named:
    """The next token's log-probability, the largest logits, and what else a slice holds."""
    log_probs = part.logits.log_softmax(dim=1)
    found = {
        "next_log_prob": log_probs.gather(1, part.next_ids.clamp(min=0)[:, None])[:, 0],
        "top_values": part.logits.topk(4).values,
        "top_ids": part.logits.topk(4).indices.to(torch.int32),
        "next_ids": part.next_ids,
        "places": part.places,
        "states": part.states.half(),
    }
    return Named({name: value.numpy() for name, value in found.items()})


def expected_of(
    teacher: LanguageModelTeacher, samples: Sequence[PackedSample]
) -> dict[str, np.ndarray]:
    """The same by the model's own forward pass over each piece alone."""
    parts: list[Named] = []
    for sample in samples:
        pieces = [piece.stop - piece.start for piece in sample.pieces]
        for ids in torch.from_numpy(sample.input_ids.astype(np.int64)).split(pieces):
            with torch.no_grad():
                output: Any = teacher.model(ids[None], use_cache=False, output_hidden_states=True)
            following = torch.cat([ids[1:], ids.new_full((1,), NO_LABEL)])
            part = Slice(
                logits=output.logits[0],
                next_ids=following,
                places=torch.zeros_like(ids),
                states=output.hidden_states[-1][0],
            )
            parts.append(reduced(part))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def joined(outputs: PositionOutputs[Named]) -> dict[str, np.ndarray]:
    """All samples' positions end to end."""
    parts = [part for pieces in outputs.pieces for part in pieces]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check(outputs: PositionOutputs[Named], expected: dict[str, np.ndarray]) -> None:
    found = joined(outputs)
    assert found.keys() == expected.keys()
    assert np.array_equal(found["places"], np.arange(len(found["places"])))
    for name in expected.keys() - {"places"}:
        assert found[name].dtype == expected[name].dtype
        if expected[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
        else:
            assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("batching", [PACKED, PADDED])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("slice_logits", [1, 200_000, 10**9])
def test_every_position_is_reduced_in_order(
    teacher: LanguageModelTeacher,
    samples: list[PackedSample],
    batching: Batching,
    batch_tokens: int,
    slice_logits: int,
) -> None:
    done: list[tuple[int, int]] = []
    found = run_positions(
        replace(teacher, batching=batching),
        samples,
        reduced,
        batch_tokens=batch_tokens,
        slice_logits=slice_logits,
        on_batch=lambda *counts: done.append(counts),
    )
    check(found, expected_of(teacher, samples))
    lengths = [sum(len(part["places"]) for part in pieces) for pieces in found.pieces]
    assert lengths == [len(sample.input_ids) for sample in samples]
    assert found.num_halvings == 0
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    assert tuple(np.sum(done, axis=0)) == (len(samples), num_tokens)


def test_no_slice_is_larger_than_it_may_be(
    teacher: LanguageModelTeacher, samples: list[PackedSample]
) -> None:
    sizes: list[int] = []

    def watched(part: Slice) -> Named:
        sizes.append(len(part.logits))
        return Named()

    limit = 7 * teacher.num_logits + 5
    run_positions(teacher, samples, watched, batch_tokens=10_000, slice_logits=limit)
    assert max(sizes) == 7 and sum(sizes) == sum(len(sample.input_ids) for sample in samples)


def test_the_base_runs_a_batch_once_and_the_head_never_whole(
    teacher: LanguageModelTeacher, samples: list[PackedSample]
) -> None:
    of_base: list[int] = []
    of_head: list[int] = []
    head: Any = teacher.model.get_output_embeddings()
    hooks = [
        teacher.model.base_model.register_forward_hook(lambda *_: of_base.append(1)),
        head.register_forward_hook(lambda _, __, out: of_head.append(out.shape[-2])),
    ]
    try:
        limit = 10 * teacher.num_logits
        run_positions(teacher, samples, reduced, batch_tokens=10_000, slice_logits=limit)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(of_base) == 1 and max(of_head) == 10


def test_out_of_memory_halves_a_batch_even_in_the_head(
    teacher: LanguageModelTeacher, samples: list[PackedSample], caplog: pytest.LogCaptureFixture
) -> None:
    most = 2
    in_head = [True]
    expected = expected_of(teacher, samples)

    def scarce(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def once(part: Slice) -> Named:
        # The second slice of the first batch: what the first one left is written again.
        if part.places[0] > 0 and in_head:
            in_head.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reduced(part)

    hook = teacher.model.base_model.register_forward_pre_hook(scarce, with_kwargs=True)
    try:
        with caplog.at_level(logging.WARNING, logger="teacher_cache"):
            found = run_positions(
                teacher, samples, once, batch_tokens=10_000, slice_logits=20 * teacher.num_logits
            )
    finally:
        hook.remove()
    assert found.num_halvings >= 2 and not in_head
    assert "out of memory on a batch" in caplog.text
    check(found, expected)


def test_a_sample_that_does_not_fit_is_a_sentence(
    teacher: LanguageModelTeacher, samples: list[PackedSample]
) -> None:
    def full(_: Slice) -> Named:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="does not fit into the device's memory"):
        run_positions(teacher, samples, full, batch_tokens=10_000)


@pytest.mark.parametrize(
    ("value", "is_refused"), [(np.nan, True), (np.inf, True), (-np.inf, False)]
)
def test_logits_that_are_no_numbers(
    teacher: LanguageModelTeacher, samples: list[PackedSample], value: float, is_refused: bool
) -> None:
    def spoiled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., 17] = value
        return output

    head: Any = teacher.model.get_output_embeddings()
    hook = head.register_forward_hook(spoiled)
    try:
        if is_refused:
            with pytest.raises(UserError, match="not finite everywhere: give --dtype float32"):
                run_positions(teacher, samples, reduced, batch_tokens=10_000)
        else:  # an id that is no token
            found = joined(run_positions(teacher, samples, reduced, batch_tokens=10_000))
            assert np.isfinite(found["top_values"]).all()
    finally:
        hook.remove()


def test_no_samples(teacher: LanguageModelTeacher) -> None:
    assert run_positions(teacher, [], reduced, batch_tokens=8).pieces == []
