"""What any causal language model says at each position: checked, packed or a row a document."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.collation import length_sorted_batches, pad_batch

FILLER_ID = 0  # fills batches where nothing looks
_TRIED_LENGTHS = (9, 1, 14, 3, 6)
_TRIED_TOLERANCE = 1e-3  # of the largest logit; float32 rounds a thousand times finer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlacedPiece:
    """Where a piece of a sample stands in a batch.

    Attributes:
        row: of the batch.
        start: its first position in the row.
        stop: one past its last.
        sample: its index among all samples.
        piece: its index in the sample.
    """

    row: int
    start: int
    stop: int
    sample: int
    piece: int


class Tap(Protocol):
    """What listens to a model's layers, told of each batch before it runs."""

    def expect(self, pieces: Sequence[PlacedPiece]) -> None:
        """The next batch's rows hold these pieces."""
        ...


def packed_in_rows(
    sample_idxs: Sequence[int], lengths: Sequence[Sequence[int]]
) -> list[PlacedPiece]:
    """Where pieces stand in a batch with a sample in each row.

    Args:
        sample_idxs: of the rows' samples.
        lengths: of the pieces of each, end to end.
    """
    placed: list[PlacedPiece] = []
    for row, (sample, of_one) in enumerate(zip(sample_idxs, lengths, strict=True)):
        ends = np.cumsum(of_one).tolist()
        placed += [
            PlacedPiece(row=row, start=end - length, stop=end, sample=sample, piece=piece)
            for piece, (end, length) in enumerate(zip(ends, of_one, strict=True))
        ]
    return placed


def one_a_row(
    sample_idxs: Sequence[int], lengths: Sequence[Sequence[int]], chosen: Sequence[int] | np.ndarray
) -> list[PlacedPiece]:
    """Where pieces stand in a batch with a piece in each row.

    Args:
        sample_idxs: of some samples.
        lengths: of the pieces of each.
        chosen: the pieces of the rows, as indices into all pieces of these samples in order.
    """
    every = [
        (sample, piece, length)
        for sample, of_one in zip(sample_idxs, lengths, strict=True)
        for piece, length in enumerate(of_one)
    ]
    rows = enumerate(every[i] for i in chosen)
    return [
        PlacedPiece(row=row, start=0, stop=length, sample=sample, piece=piece)
        for row, (sample, piece, length) in rows
    ]


def check_language_model(name: str, model: PreTrainedModel) -> bool:
    """Whether a model packs, from one small pass; refuse what is no causal language model to us.

    Args:
        name: it is called in a message.
        model: in float32, in evaluation mode.

    Raises:
        UserError: if its logits depend on later tokens, or are not found again by `final_states`
            and `head_logits`.
    """
    generator = torch.Generator().manual_seed(0)
    most = min(1000, own_logits(model, np.zeros(1, np.uint32)).shape[-1])
    documents = [
        torch.randint(most, (n,), generator=generator).numpy().astype(np.uint32)
        for n in _TRIED_LENGTHS
    ]
    alone = [own_logits(model, ids) for ids in documents]
    longest = max(documents, key=len)
    whole, start = own_logits(model, longest), own_logits(model, longest[: len(longest) // 2])
    if not _are_close(start, whole[: len(start)]):
        raise UserError(
            f"{name} ({type(model).__name__}) looks at later tokens, so its predictions of them "
            "say nothing: give a causal language model"
        )
    joined = np.concatenate(documents)
    # The second row makes the first one's padding and the batch's order show.
    *first, last = _TRIED_LENGTHS
    sequences, lengths = [joined[:-1], joined], [[*first, last - 1], [*first, last]]
    expected = torch.cat([*alone[:-1], alone[-1][:-1], *alone])
    for packs in (True, False):
        try:
            states = final_states(model, sequences, lengths, packs=packs)
            found = head_logits(model, states)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            logger.debug("%s, packs=%s: %s", name, packs, error)
            continue
        if _are_close(found, expected):
            if not packs:
                logger.warning(
                    "%s (%s) does not keep packed documents apart: each runs as a row of its own, "
                    "which takes longer",
                    name,
                    type(model).__name__,
                )
            return packs
    raise UserError(
        f"the logits of {name} ({type(model).__name__}) are not those of its head on its base "
        "model's last states, so they cannot be computed a slice at a time: give a causal "
        "language model of a more common kind"
    )


@torch.inference_mode()
def final_states(
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    lengths: Sequence[Sequence[int]],
    *,
    packs: bool,
    tap: Tap | None = None,
    sample_idxs: Sequence[int] = (),
) -> Tensor:
    """What the head reads, of every token: [N, D], the sequences end to end, on the model's device.

    Args:
        model: in evaluation mode.
        sequences: token ids, [S_i] each, N in all.
        lengths: of the documents of each sequence, which nothing crosses; they add up to S_i.
        packs: whether the model runs several documents in one row.
        tap: listens to the layers.
        sample_idxs: what it is told that the sequences are.
    """
    if packs:
        if tap is not None:
            tap.expect(packed_in_rows(sample_idxs, lengths))
        return _states_packed(model, sequences, lengths)
    ends = np.cumsum([length for of_one in lengths for length in of_one])
    rows = np.split(np.concatenate(sequences), ends[:-1])

    def announce(batch: np.ndarray) -> None:
        if tap is not None:
            tap.expect(one_a_row(sample_idxs, lengths, batch))

    return _states_of_rows(
        model,
        rows,
        max_tokens=len(sequences) * max(len(ids) for ids in sequences),
        before_batch=announce,
    )


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The model's logits [n, V] float32 of some of its final states [n, D]."""
    headed = copy.copy(model)  # with the same layers, but for the base model
    headed._modules = {**model._modules, model.base_model_prefix: _Answering()}
    with torch.inference_mode():
        return headed(inputs_embeds=states[None], use_cache=False).logits[0].float()


class _Answering(nn.Module):
    """A base model that gives its input embeddings out as its last hidden states."""

    @property
    def decoder(self) -> _Answering:
        """Itself: OPT's head asks its base model's decoder."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Answer:
        return _Answer(inputs_embeds)


class _Answer:
    """A base model's output with nothing but last hidden states."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getitem__(self, idx: int) -> Tensor:
        return (self.last_hidden_state,)[idx]

    def __getattr__(self, name: str) -> None:
        return None


def _states_packed(
    model: PreTrainedModel, sequences: Sequence[np.ndarray], lengths: Sequence[Sequence[int]]
) -> Tensor:
    padded, mask = pad_batch(sequences, FILLER_ID)
    places = np.zeros_like(padded)  # filler is at 0 each time: a document of its own
    for row, of_one in enumerate(lengths):
        joined = np.concatenate([np.arange(length) for length in of_one])
        places[row, : len(joined)] = joined
    output = model.base_model(
        input_ids=torch.from_numpy(padded).to(model.device),  # [B, S]
        position_ids=torch.from_numpy(places).to(model.device),
        use_cache=False,
    )
    return output.last_hidden_state[torch.from_numpy(mask).to(model.device)]


def _states_of_rows(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    *,
    max_tokens: int,
    before_batch: Callable[[np.ndarray], None],
) -> Tensor:
    """[N, D] of rows that are padded on the right, in their order."""
    starts = np.cumsum([0, *(len(row) for row in rows)]).tolist()
    found: list[Tensor] = []
    places: list[np.ndarray] = []  # of what is found, among all tokens
    for batch in length_sorted_batches([len(row) for row in rows], max_tokens=max_tokens):
        padded, mask = pad_batch([rows[i] for i in batch], FILLER_ID)
        real = torch.from_numpy(mask).to(model.device)
        before_batch(batch)
        output = model.base_model(
            input_ids=torch.from_numpy(padded).to(model.device),  # [B, S]
            attention_mask=real.long(),
            use_cache=False,
        )
        found.append(output.last_hidden_state[real])
        places += [np.arange(starts[i], starts[i + 1]) for i in batch]
    joined = torch.cat(found)
    states = torch.empty_like(joined)
    states[torch.from_numpy(np.concatenate(places)).to(model.device)] = joined
    return states


def own_logits(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """[S, V] of one document, as the model itself computes them."""
    with torch.inference_mode():
        given = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
        return model(given, use_cache=False).logits[0]


def _are_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    most = _TRIED_TOLERANCE * expected.abs().max()
    return bool((found - expected).abs().max() <= most)
