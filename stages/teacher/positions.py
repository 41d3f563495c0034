"""What a language model says at every position of packed samples, reduced slice by slice.

On the device there are one batch's final states and one slice's logits at a time, on the host the
reduced values of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.models.causal import final_states, head_logits
from teacher_cache.stages.models.inference import OnBatch, for_each_batch
from teacher_cache.stages.teacher.layers import LayerTap
from teacher_cache.stages.teacher.load import LanguageModelTeacher

SLICE_LOGITS = 2**25  # 128 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some positions of a batch, on the device.

    Attributes:
        logits: [n, V] float32.
        next_ids: [n] int64, each position's next token; 0 where it is of another document or there
            is none.
        counts: [n] bool, whether there is a next token of the same document.
        places: [n] int64, each position's index among those of all samples end to end: the same in
            any batch, so that a draw can be seeded with it.
        states: [n, D], what the head made the logits of, in the teacher's number format.
    """

    logits: Tensor
    next_ids: Tensor
    counts: Tensor
    places: Tensor
    states: Tensor


# To named values of each position, [n, ...] each, on the host.
Reduce = Callable[[Slice], dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class PositionOutputs:
    """Reduced values of every position.

    Attributes:
        values: [N, ...] by name, N positions of all samples end to end, in the samples' order.
        num_halvings: how often a batch ran out of memory and was halved.
    """

    values: dict[str, np.ndarray]
    num_halvings: int


def run_positions(
    teacher: LanguageModelTeacher,
    samples: Sequence[PackedSample],
    reduce: Reduce,
    *,
    batch_tokens: int,
    slice_logits: int = SLICE_LOGITS,
    tap: LayerTap | None = None,
    on_batch: OnBatch | None = None,
) -> PositionOutputs:
    """Run the teacher over packed samples and keep what `reduce` makes of its logits.

    Args:
        teacher: on its device.
        samples: of one shard.
        reduce: sees every position, in slices; after memory ran out, some of them again.
        batch_tokens: padded positions in a batch.
        slice_logits: at most so many logits at a time, but those of one position.
        tap: listens to the layers; its samples are those of `samples`.
        on_batch: called after each batch with its samples and tokens.

    Raises:
        UserError: if a single sample does not fit into memory, or a position's logits are no
            numbers.
    """
    lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
    starts = np.cumsum([0, *lengths]).tolist()
    values: dict[str, np.ndarray] = {}

    def run(batch: np.ndarray) -> None:
        chosen = {int(i): samples[i] for i in batch}
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        with torch.inference_mode():
            for part in _slices(teacher, chosen, places, slice_logits, tap):
                where = part.places.cpu().numpy()
                for name, kept in reduce(part).items():
                    if name not in values:
                        values[name] = np.empty((starts[-1], *kept.shape[1:]), kept.dtype)
                    values[name][where] = kept

    with tap or nullcontext():
        num_halvings = for_each_batch(run, lengths, max_tokens=batch_tokens, on_batch=on_batch)
    return PositionOutputs(values=values, num_halvings=num_halvings)


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
            packs=teacher.packs,
            tap=tap,
            sample_idxs=range(len(samples)),
        )


def next_ids(sample: PackedSample) -> np.ndarray:
    """Each position's next token, int64 [S]; 0 where the loss mask is False."""
    following = np.append(sample.input_ids[1:], 0).astype(np.int64)
    return np.where(sample.loss_mask, following, 0)


def _slices(
    teacher: LanguageModelTeacher,
    batch: Mapping[int, PackedSample],
    places: np.ndarray,
    slice_logits: int,
    tap: LayerTap | None,
) -> Iterator[Slice]:
    """A batch's positions, sample by sample, with their logits.

    Raises:
        UserError: if the logits of a position are no numbers.
    """
    samples = list(batch.values())
    states = final_states(
        teacher.model,
        [sample.input_ids for sample in samples],
        [[piece.stop - piece.start for piece in sample.pieces] for sample in samples],
        packs=teacher.packs,
        tap=tap,
        sample_idxs=list(batch),
    )
    following = _on(teacher, np.concatenate([next_ids(sample) for sample in samples]))
    counts = _on(teacher, np.concatenate([sample.loss_mask for sample in samples]))
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
            counts=counts[part],
            places=where[part],
            states=states[part],
        )


def _on(teacher: LanguageModelTeacher, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(teacher.device)
