"""What a model, teacher or student, says of many samples, batch by batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.models.batching import (
    MODEL_FAILURES,
    Batching,
    logits_close,
    measured_batching,
)
from teacher_cache.stages.models.pretrained import class_names
from teacher_cache.stages.tokens.frame import surroundings
from teacher_cache.stages.tokens.tokenizers import special_ids

_TRIED_IDS = 1000

logger = logging.getLogger(__name__)

OnBatch = Callable[[int, int], None]  # called with samples and tokens done
# From ids [B, S] int64, mask [B, S] and token types [B, S], or none, to named vectors [B, width].
BatchForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Named vectors of every sample, in the samples' order.

    Attributes:
        vectors: each [N, width] float32, by name.
        num_halvings: how often a batch ran out of memory and was halved.
    """

    vectors: dict[str, np.ndarray]
    num_halvings: int


@dataclass(frozen=True, kw_only=True)
class ClassLogits:
    """Logits in the samples' order.

    Attributes:
        logits: [N, C] float32.
        num_halvings: how often a batch ran out of memory and was halved.
    """

    logits: np.ndarray
    num_halvings: int


def class_logits(
    model: PreTrainedModel,
    input_ids: Sequence[np.ndarray],
    *,
    num_classes: int,
    pad_id: int,
    batching: Batching,
    max_tokens: int,
    autocast: torch.dtype = torch.float32,
    token_types: Sequence[np.ndarray] | None = None,
    on_batch: OnBatch | None = None,
) -> ClassLogits:
    """A classifier's logits of samples, as `run_in_batches` runs it.

    Args:
        model: in evaluation mode, on its device.
        input_ids: token ids of each sample, [S_i], S_i > 0.
        num_classes: C.
        pad_id: fills the right end of shorter samples; masked.
        batching: of the model.
        max_tokens: padded positions in a batch; a longer sample is a batch of its own.
        autocast: number format of the products of a model whose weights are float32, as a student
            is trained; float32 leaves the model as it is.
        token_types: as in `run_in_batches`.
        on_batch: called after each batch.

    Raises:
        UserError: if a single sample does not fit into memory.
    """
    outputs = run_in_batches(
        lambda ids, mask, types: {"logits": forward(model, ids, mask, autocast, types)},
        input_ids,
        widths={"logits": num_classes},
        pad_id=pad_id,
        batching=batching,
        max_tokens=max_tokens,
        token_types=token_types,
        on_batch=on_batch,
    )
    return ClassLogits(logits=outputs.vectors["logits"], num_halvings=outputs.num_halvings)


def run_in_batches(
    batch_forward: BatchForward,
    input_ids: Sequence[np.ndarray],
    *,
    widths: Mapping[str, int],
    pad_id: int,
    batching: Batching,
    max_tokens: int,
    token_types: Sequence[np.ndarray] | None = None,
    before_batch: Callable[[np.ndarray], None] | None = None,
    on_batch: OnBatch | None = None,
) -> Outputs:
    """Run a model over samples in batches of at most `max_tokens` positions.

    A batch that runs out of memory is halved, and that is said and counted.

    Args:
        batch_forward: one forward pass of a batch.
        input_ids: token ids of each sample, [S_i], S_i > 0.
        widths: of the vectors that `batch_forward` returns, by name.
        pad_id: fills the right end of shorter samples; masked.
        batching: of the model.
        max_tokens: padded positions in a batch; a longer sample is a batch of its own.
        token_types: of the tokens, [S_i]; None: the model gets none.
        before_batch: called before each pass with the indices of the samples in its rows.
        on_batch: called after each batch.

    Raises:
        UserError: if a single sample does not fit into memory.
    """
    vectors = {name: np.empty((len(input_ids), w), np.float32) for name, w in widths.items()}

    def run(batch: np.ndarray) -> None:
        padded, mask = pad_batch([input_ids[i] for i in batch], pad_id)
        types = None
        if token_types is not None:
            types = torch.from_numpy(pad_batch([token_types[i] for i in batch], 0)[0])
        if before_batch is not None:
            before_batch(batch)
        with told_in_a_sentence(lengths[batch]):
            found = batch_forward(torch.from_numpy(padded), torch.from_numpy(mask), types)
        for name, values in vectors.items():
            values[batch] = found[name].cpu().numpy()

    lengths = np.array([len(ids) for ids in input_ids], np.int64)
    batches = batching.batches(input_ids, max_tokens=max_tokens)
    num_halvings = for_each_batch(run, batches, lengths, on_batch=on_batch)
    return Outputs(vectors=vectors, num_halvings=num_halvings)


def for_each_batch(
    run: Callable[[np.ndarray], None],
    batches: Sequence[np.ndarray],
    lengths: np.ndarray,
    *,
    on_batch: OnBatch | None = None,
) -> int:
    """Run batches of samples, one after the other.

    A batch that runs out of memory is halved, and that is said and counted.

    Args:
        run: runs the samples of these indices and keeps what it finds; where memory ran out it is
            run again for each half, so it must not mind having done some of them.
        batches: indices of samples.
        lengths: tokens of each sample, [N], all positive.
        on_batch: called after each batch.

    Returns:
        How often a batch was halved.

    Raises:
        UserError: if a single sample does not fit into memory.
    """
    num_halvings = 0
    pending = list(reversed(batches))
    while pending:
        batch = pending.pop()
        has_room = True
        try:
            run(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            has_room = False
        if not has_room:  # only now: the exception held the batch's tensors
            pending.extend(_halves(batch, int(lengths[batch].max())))
            num_halvings += 1
            continue
        if on_batch is not None:
            on_batch(len(batch), int(lengths[batch].sum()))
    return num_halvings


@contextmanager
def told_in_a_sentence(lengths: np.ndarray) -> Iterator[None]:
    """Where what a model raises of itself becomes a person's sentence; lack of memory does not.

    Args:
        lengths: tokens of the samples that it is given.

    Raises:
        UserError: if it fails on them.
    """
    try:
        yield
    except MODEL_FAILURES as error:
        if _is_out_of_memory(error):
            raise
        raise UserError(
            f"the model fails on {len(lengths)} samples of {lengths.min()} to {lengths.max()} "
            f"tokens ({first_line(error)}): leave such documents out, or give another model"
        ) from error


def forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    autocast: torch.dtype,
    token_types: torch.Tensor | None = None,
) -> torch.Tensor:
    """One batch's logits [B, C] float32, without gradients, on the model's device.

    Args:
        model: in evaluation mode.
        input_ids: [B, S] int64.
        mask: [B, S], nonzero at real tokens.
        autocast: as in `class_logits`.
        token_types: [B, S] int64; None: the model gets none.
    """
    device = model.device
    is_on = autocast is not torch.float32
    types = {} if token_types is None else {"token_type_ids": token_types.to(device)}
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=is_on):
        output = model(
            input_ids=input_ids.to(device), attention_mask=mask.to(device, torch.int64), **types
        )
    return output.logits.float()


def read_in_passes(model: PreTrainedModel, batching: Batching) -> None:
    """Let a classifier in training read a batch in the passes that its batching asks for.

    Its forward then takes `input_ids` [B, S], padded on the right, and `attention_mask`, and gives
    logits [B, C].
    """
    whole = model.forward

    @functools.wraps(whole)
    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> ModelOutput:
        lengths = attention_mask.sum(dim=1).tolist()
        rows = zip(input_ids.cpu().numpy(), lengths, strict=True)
        sequences = [ids[:length] for ids, length in rows]
        batches = batching.batches(sequences, max_tokens=input_ids.numel())
        logits = []
        for batch in batches:
            idxs = torch.from_numpy(batch).to(input_ids.device)
            width = len(sequences[batch[0]])  # the longest stands first
            ids, mask = input_ids[idxs, :width], attention_mask[idxs, :width]
            logits.append(whole(input_ids=ids, attention_mask=mask, **kwargs).logits)
        back = torch.from_numpy(np.argsort(np.concatenate(batches))).to(input_ids.device)
        return SequenceClassifierOutput(logits=torch.cat(logits)[back])

    model.forward = run


def classifier_batching(
    name: str,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    *,
    pad_id: int,
    max_length: int,
    plain: Batching,
) -> Batching:
    """How a classifier reads documents together, from a few passes.

    Args:
        name: it is called in a message.
        model: in evaluation mode.
        tokenizer: its own.
        pad_id: fills the right end of shorter documents; masked.
        max_length: the longest sample in tokens.
        plain: padded rows; what its texts need whatever the model does.

    Raises:
        UserError: if its logits are others each time, or it reads no short text.
    """

    def read(documents: Sequence[np.ndarray], batching: Batching) -> list[torch.Tensor]:
        outputs = class_logits(
            model,
            documents,
            num_classes=len(class_names(model)),
            pad_id=pad_id,
            batching=batching,
            max_tokens=sum(len(ids) for ids in documents) * len(documents),
        )
        return list(torch.from_numpy(outputs.logits)[:, None])

    return measured_batching(
        name,
        model.config,
        read,
        _texts(tokenizer, {pad_id}),
        logits_close,
        max_length=max_length,
        plain=(plain,),
    )


def _texts(tokenizer: Tokenizer, unused: set[int]) -> Callable[[int], np.ndarray]:
    """Documents of random tokens between the special tokens of any text."""
    around = surroundings(tokenizer)
    special = special_ids(tokenizer) | unused
    ids = sorted(one for one in tokenizer.get_vocab().values() if one not in special)[:_TRIED_IDS]
    generator = np.random.default_rng(0)

    def document(length: int) -> np.ndarray:
        num = max(1, length - len(around.before) - len(around.after))
        return np.array([*around.before, *generator.choice(ids, num), *around.after], np.uint32)

    return document


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has its own exception; on a CPU torch raises a RuntimeError of the allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _halves(batch: np.ndarray, longest: int) -> list[np.ndarray]:
    if len(batch) == 1:
        raise UserError(
            f"one sample of {longest} tokens does not fit into the device's memory: give a "
            "smaller --max-length, a smaller --dtype or a larger device"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    logger.warning(
        "out of memory on a batch of %d samples of up to %d tokens: halved it; a smaller "
        "--batch-tokens avoids this",
        len(batch),
        longest,
    )
    return [batch[middle:], batch[:middle]]
