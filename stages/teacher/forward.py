"""One forward pass of the teacher: class logits, and what its head read where that is asked for.

A classifier's *pooled state* is the vector that its classification head reads: the input of the
first linear layer behind the base model. That is BERT's pooler output, the first token's last state
in RoBERTa and DistilBERT. A decoder's head (GPT-2, Llama) reads every position and the model picks
one row of its logits, so there it is the input at the position whose logits the model returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import POOLED
from teacher_cache.stages.models.causal import packed_in_rows
from teacher_cache.stages.models.inference import OnBatch, Outputs, forward, run_in_batches
from teacher_cache.stages.teacher.layers import LayerTap
from teacher_cache.stages.teacher.load import ClassificationTeacher


def run_teacher(
    teacher: ClassificationTeacher,
    input_ids: Sequence[np.ndarray],
    *,
    batch_tokens: int,
    pooled_width: int | None,
    tap: LayerTap | None = None,
    on_batch: OnBatch | None = None,
) -> Outputs:
    """The teacher's `class_logits` [N, C], and `pooled` [N, D] where its width is given.

    Args:
        teacher: on its device.
        input_ids: token ids of each sample, [S_i], S_i > 0.
        batch_tokens: padded positions in a batch.
        pooled_width: D; None leaves the pooled states out.
        tap: listens to the layers; its samples are those of `input_ids`.
        on_batch: called after each batch.

    Raises:
        UserError: if a single sample does not fit into memory.
    """
    model = teacher.model

    def logits_alone(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"class_logits": forward(model, ids, mask, torch.float32)}

    def with_pooled(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits, pooled = logits_and_pooled(model, ids, mask)
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
            max_tokens=batch_tokens,
            before_batch=announce,
            on_batch=on_batch,
        )


def find_pooled_width(teacher: ClassificationTeacher) -> int:
    """D of the teacher's pooled states, from one short text.

    Raises:
        UserError: if its pooled state cannot be told.
    """
    ids = torch.tensor([teacher.tokenizer("a")["input_ids"]])
    _, pooled = logits_and_pooled(teacher.model, ids, torch.ones_like(ids))
    return pooled.shape[1]


def logits_and_pooled(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """A batch's logits [B, C] and pooled states [B, D], float32, from one forward pass.

    Args:
        model: in evaluation mode.
        input_ids: [B, S] int64.
        mask: [B, S], nonzero at real tokens.

    Raises:
        UserError: if it cannot be told what the head reads.
    """
    calls: list[tuple[Tensor, Tensor]] = []  # of the head's linear layers: input, output

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    hooks = [layer.register_forward_hook(remember) for layer in _head_layers(model)]
    try:
        logits = forward(model, input_ids, mask, torch.float32)
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
    in_base = {id(module) for module in model.base_model.modules()}
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
