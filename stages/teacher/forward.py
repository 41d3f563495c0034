"""Forward passes of a teacher over samples: of a classifier, and at every position of packed text.

A classifier's *pooled state* is the vector that its classification head reads: the input of the
first linear layer behind the base model. That is BERT's pooler output, the first token's last state
in RoBERTa and DistilBERT. A decoder's head (GPT-2, Llama) reads every position and the model picks
one row of its logits, so there it is the input at the position whose logits the model returned.

Of a language model there are, on the device, one batch's final states and one slice's logits at a
time, on the host the reduced values of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import POOLED
from teacher_cache.stages.data.collation import length_sorted_batches
from teacher_cache.stages.data.packing import PackedSample, next_ids
from teacher_cache.stages.models.batching import Batching
from teacher_cache.stages.models.causal import final_states, head_logits, packed_in_rows
from teacher_cache.stages.models.inference import (
    OnBatch,
    Outputs,
    for_each_batch,
    forward,
    run_in_batches,
    told_in_a_sentence,
)
from teacher_cache.stages.models.pretrained import base_of
from teacher_cache.stages.teacher.layers import TRIED_TEXT, LayerTap
from teacher_cache.stages.teacher.load import ClassificationTeacher, LanguageModelTeacher

SLICE_LOGITS = 2**25  # 128 MiB in float32


def run_teacher(
    teacher: ClassificationTeacher,
    input_ids: Sequence[np.ndarray],
    *,
    batch_tokens: int,
    pooled_width: int | None,
    token_types: Sequence[np.ndarray] | None = None,
    batching: Batching | None = None,
    tap: LayerTap | None = None,
    on_batch: OnBatch | None = None,
) -> Outputs:
    """The teacher's `class_logits` [N, C], and `pooled` [N, D] where its width is given.

    Args:
        teacher: on its device.
        input_ids: token ids of each sample, [S_i], S_i > 0.
        batch_tokens: padded positions in a batch.
        pooled_width: D; None leaves the pooled states out.
        token_types: of each sample of pairs, [S_i]; None where the teacher gets none.
        batching: instead of the teacher's.
        tap: listens to the layers; its samples are those of `input_ids`.
        on_batch: called after each batch.

    Raises:
        UserError: if a single sample does not fit into memory.
    """
    model = teacher.model

    def logits_alone(ids: Tensor, mask: Tensor, types: Tensor | None) -> dict[str, Tensor]:
        return {"class_logits": forward(model, ids, mask, torch.float32, types)}

    def with_pooled(ids: Tensor, mask: Tensor, types: Tensor | None) -> dict[str, Tensor]:
        logits, pooled = logits_and_pooled(model, ids, mask, types)
        return {"class_logits": logits, POOLED: pooled}

    def announce(batch: np.ndarray) -> None:
        if tap is not None:
            tap.expect(packed_in_rows(batch.tolist(), [[len(input_ids[i])] for i in batch]))

    widths = {"class_logits": len(teacher.id2label)}
    with tap or nullcontext():
        return run_in_batches(
            logits_alone if pooled_width is None else with_pooled,
            input_ids,
            widths=widths if pooled_width is None else {**widths, POOLED: pooled_width},
            pad_id=teacher.pad_id,
            batching=batching or teacher.batching,
            max_tokens=batch_tokens,
            token_types=token_types,
            before_batch=announce,
            on_batch=on_batch,
        )


def find_pooled_width(teacher: ClassificationTeacher) -> int:
    """D of the teacher's pooled states, from one short text.

    Raises:
        UserError: if its pooled state cannot be told.
    """
    ids = torch.tensor([teacher.tokenizer(TRIED_TEXT)["input_ids"]])
    _, pooled = logits_and_pooled(teacher.model, ids, torch.ones_like(ids))
    return pooled.shape[1]


def logits_and_pooled(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, token_types: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A batch's logits [B, C] and pooled states [B, D], float32, from one forward pass.

    Args:
        model: in evaluation mode.
        input_ids: [B, S] int64.
        mask: [B, S], nonzero at real tokens.
        token_types: [B, S] int64, or none.

    Raises:
        UserError: if it cannot be told what the head reads.
    """
    calls: list[tuple[Tensor, Tensor]] = []  # of the head's linear layers: input, output

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    hooks = [layer.register_forward_hook(remember) for layer in _head_layers(model)]
    try:
        logits = forward(model, input_ids, mask, torch.float32, token_types)
    finally:
        for hook in hooks:
            hook.remove()
    pooled = _read_by_head(calls, logits, mask.to(logits.device).bool()) if calls else None
    if pooled is None:
        raise UserError(
            f"--hidden pooled cannot tell what vector the classification head of "
            f"{type(model).__name__} reads of a sample: leave it out, or choose a teacher whose "
            "head begins with a linear layer behind its base model"
        )
    return logits, pooled.float()


def _head_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Linear layers that are not of the base model."""
    in_base = {id(module) for module in base_of(model).modules()}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in in_base
    ]


def _read_by_head(
    calls: Sequence[tuple[Tensor, Tensor]], logits: Tensor, mask: Tensor
) -> Tensor | None:
    """[B, D]: what the head's first layer read, at the position that gave the logits [B, C]."""
    first_input, last_output = calls[0][0], calls[-1][1]
    if first_input.shape[:-1] == mask.shape[:1]:
        return first_input
    each_position = (*mask.shape, logits.shape[-1])
    if first_input.shape[:-1] != mask.shape or last_output.shape != each_position:
        return None
    # The model picked a row, so its bits are the same; NaN is for the caller to refuse.
    same = torch.isclose(
        last_output.float(), logits[:, None], rtol=0.0, atol=0.0, equal_nan=True
    ).all(dim=-1)
    same &= mask  # [B, S]
    if not same.any(dim=1).all():
        return None
    # The last of equal ones: a causal decoder has read all there.
    position = (same * torch.arange(same.shape[1], device=same.device)).argmax(dim=1)
    return first_input[torch.arange(len(position), device=position.device), position]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some positions of a batch, on the device.

    Attributes:
        logits: [n, V] float32.
        next_ids: [n] int64, each position's next token; `NO_LABEL` where it is of another document
            or there is none.
        places: [n] int64, each position's index among those of all samples end to end: the same in
            any batch, so that a draw can be seeded with it.
        states: [n, D], what the head made the logits of, in the teacher's number format.
    """

    logits: Tensor
    next_ids: Tensor
    places: Tensor
    states: Tensor


class PerPosition(Protocol):
    """What is kept of some positions, on the host."""

    def __getitem__(self, where: slice, /) -> Self:
        """Those of some of them."""
        ...


Kept = TypeVar("Kept", bound=PerPosition)


@dataclass(frozen=True, kw_only=True)
class PositionOutputs(Generic[Kept]):
    """What was kept of every position.

    Attributes:
        pieces: of each sample, in the samples' order, what was kept of its positions that are
            spoken of, in theirs.
        num_halvings: how often a batch ran out of memory and was halved.
    """

    pieces: list[list[Kept]]
    num_halvings: int


def run_positions(
    teacher: LanguageModelTeacher,
    samples: Sequence[PackedSample],
    reduce: Callable[[Slice], Kept],
    *,
    batch_tokens: int,
    batching: Batching | None = None,
    slice_logits: int = SLICE_LOGITS,
    tap: LayerTap | None = None,
    on_batch: OnBatch | None = None,
) -> PositionOutputs[Kept]:
    """Run the teacher over packed samples and keep what `reduce` makes of its logits.

    Args:
        teacher: on its device.
        samples: of one shard.
        reduce: sees every position at which a sample is spoken of, in slices; after memory ran
            out, some of them again.
        batch_tokens: padded positions in a batch.
        batching: instead of the teacher's.
        slice_logits: at most so many logits at a time, but those of one position.
        tap: listens to the layers; its samples are those of `samples`.
        on_batch: called after each batch with its samples and tokens.

    Raises:
        UserError: if a single sample does not fit into memory, or a position's logits are no
            numbers.
    """
    batching = batching or teacher.batching
    lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
    starts = np.cumsum([0, *lengths]).tolist()
    spoken = [np.flatnonzero(sample.is_spoken) for sample in samples]
    pieces: list[list[Kept]] = [[] for _ in samples]

    def run(batch: np.ndarray) -> None:
        chosen = {int(i): samples[i] for i in batch}
        places = np.concatenate([starts[i] + spoken[i] for i in batch])
        found: dict[int, list[Kept]] = {i: [] for i in chosen}
        borders = np.cumsum([0, *(len(spoken[i]) for i in batch)]).tolist()
        start = 0
        with torch.inference_mode():
            for part in _slices(teacher, batching, chosen, places, slice_logits, tap):
                kept, stop = reduce(part), start + len(part.places)
                for idx, i in enumerate(chosen):
                    first, last = max(start, borders[idx]), min(stop, borders[idx + 1])
                    if first < last:
                        found[i].append(kept[first - start : last - start])
                start = stop
        for i, parts in found.items():
            pieces[i] = parts

    with tap or nullcontext():
        batches = length_sorted_batches(lengths, max_tokens=batch_tokens)
        num_halvings = for_each_batch(run, batches, lengths, on_batch=on_batch)
    return PositionOutputs(pieces=pieces, num_halvings=num_halvings)


def listen_to_packed(
    teacher: LanguageModelTeacher, samples: Sequence[PackedSample], tap: LayerTap
) -> None:
    """Run the teacher over a few samples, a batch of their own, for what its layers say alone.

    Args:
        teacher: on its device.
        samples: that fit into one batch.
        tap: listens to the layers.
    """
    if not samples:
        return
    with tap:
        final_states(
            teacher.model,
            [sample.input_ids for sample in samples],
            [np.bincount(sample.segment).tolist() for sample in samples],
            batching=teacher.batching,
            tap=tap,
            sample_idxs=range(len(samples)),
        )


def _slices(
    teacher: LanguageModelTeacher,
    batching: Batching,
    batch: Mapping[int, PackedSample],
    places: np.ndarray,
    slice_logits: int,
    tap: LayerTap | None,
) -> Iterator[Slice]:
    """A batch's positions that are spoken of, sample by sample, with their logits.

    Raises:
        UserError: if the logits of a position are no numbers.
    """
    samples = list(batch.values())
    lengths = [[piece.num_tokens for piece in sample.pieces] for sample in samples]
    with told_in_a_sentence(np.concatenate(lengths)):
        states = final_states(
            teacher.model,
            [sample.input_ids for sample in samples],
            lengths,
            batching=batching,
            tap=tap,
            sample_idxs=list(batch),
        )
    is_spoken = np.concatenate([sample.is_spoken for sample in samples])
    if not is_spoken.all():
        states = states[_on(teacher, np.flatnonzero(is_spoken))]
    nexts = [next_ids(sample.input_ids, sample.segment) for sample in samples]
    following = _on(teacher, np.concatenate(nexts)[is_spoken])
    where = _on(teacher, places)
    num = max(1, slice_logits // teacher.num_logits)
    for start in range(0, len(places), num):
        part = slice(start, start + num)
        logits = head_logits(teacher.model, states[part])
        # Some models put -inf at ids that are no tokens: only a largest one must be a number.
        if not torch.isfinite(logits.amax(dim=1)).all():
            raise UserError(
                f"the logits of {teacher.name} are not finite everywhere: give --dtype float32, or "
                "bfloat16 where the device has it"
            )
        yield Slice(
            logits=logits,
            next_ids=following[part],
            places=where[part],
            states=states[part],
        )


def _on(teacher: LanguageModelTeacher, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(teacher.device)
