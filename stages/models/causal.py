"""What any causal language model says at each position: checked, packed or a row a document."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.collation import pad_batch
from teacher_cache.stages.models.batching import (
    ALONE,
    MODEL_FAILURES,
    PACKED,
    PADDED,
    Batching,
    log_probs_close,
    measured_batching,
)
from teacher_cache.stages.models.pretrained import base_of, is_quantized

FILLER_ID = 0  # fills batches where nothing looks
_TRIED_IDS = 1000
_TRIED_LENGTH = 14  # tokens
_TRIED_POSITIONS = 64  # of a long document, whose logits are compared


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


def language_model_batching(
    name: str, model: PreTrainedModel, *, max_length: int, num_ids: int | None = None
) -> Batching:
    """How a model reads documents together, from a few passes; refuse what is none to us.

    Args:
        name: it is called in a message.
        model: in float32, in evaluation mode.
        max_length: the longest sample in tokens.
        num_ids: whose logits count, those of the tokenizer; None for all.

    Raises:
        UserError: if its logits depend on later tokens, are not found again by `final_states` and
            `head_logits`, or are others each time.
    """
    generator = torch.Generator().manual_seed(0)
    most = min(_TRIED_IDS, own_logits(model, np.zeros(1, np.uint32)).shape[-1])

    def document(length: int) -> np.ndarray:
        return torch.randint(most, (length,), generator=generator).numpy().astype(np.uint32)

    def read(documents: Sequence[np.ndarray], batching: Batching) -> list[Tensor]:
        """The last logits of each, of rows that are filled up to the longest sample."""
        sequences, lengths = _in_samples(documents, batching, max_length)
        states = final_states(model, sequences, lengths, batching=batching)
        of_each = states.split([n for of_one in lengths for n in of_one])
        last = [one[-_TRIED_POSITIONS:] for one in of_each]
        logits = head_logits(model, torch.cat(last))[:, :num_ids]
        return list(logits.split([len(one) for one in last]))

    ids = document(_TRIED_LENGTH)
    changed = ids.copy()
    changed[-1] = (ids[-1] + 1) % most
    _require_causal(name, model, ids, changed, num_ids)
    _require_head_on_states(name, model, document(_TRIED_LENGTH), num_ids)
    return measured_batching(
        name,
        model.config,
        read,
        document,
        log_probs_close,
        max_length=max_length,
        plain=(PACKED, PADDED),
    )


def _in_samples(
    documents: Sequence[np.ndarray], batching: Batching, max_length: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    """Sequences and the lengths of their documents, as many in one as a sample holds."""
    groups: list[list[np.ndarray]] = []
    for ids in documents:
        has_room = groups and sum(map(len, groups[-1])) + len(ids) <= max_length
        if batching.rows == "packed" and has_room:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return [np.concatenate(one) for one in groups], [[len(ids) for ids in one] for one in groups]


def _require_causal(
    name: str,
    model: PreTrainedModel,
    ids: np.ndarray,
    changed: np.ndarray,
    num_ids: int | None,
) -> None:
    """Of a document, and of the same one with another last token."""
    whole = own_logits(model, ids)[:, :num_ids]
    half = len(ids) // 2
    looks_ahead = not log_probs_close(own_logits(model, changed)[:-1, :num_ids], whole[:-1])
    if looks_ahead and is_quantized(model):
        raise UserError(
            f"what {name} predicts at a position changes with all that shares its pass: it is "
            "quantised, and its products round by the largest of all (as bitsandbytes' of 8 bits "
            "do): give it in 4 bits or in its own number format"
        )
    if looks_ahead:
        raise UserError(
            f"{name} ({type(model).__name__}) looks at later tokens, so its predictions of them "
            "say nothing: give a causal language model"
        )
    if not log_probs_close(own_logits(model, ids[:half])[:, :num_ids], whole[:half]):
        raise UserError(
            f"what {name} ({type(model).__name__}) predicts at a position depends on how long the "
            "text goes on behind it, so it is no prediction: give a causal language model"
        )


def _require_head_on_states(
    name: str, model: PreTrainedModel, ids: np.ndarray, num_ids: int | None
) -> None:
    try:
        states = final_states(model, [ids], [[len(ids)]], batching=ALONE)
        found = head_logits(model, states)
    except MODEL_FAILURES as error:
        reason = f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    else:
        reason = ""
        if log_probs_close(found[:, :num_ids], own_logits(model, ids)[:, :num_ids]):
            return
    raise UserError(
        f"the logits of {name} ({type(model).__name__}) are not those of its head on its base "
        f"model's last states{reason}, so they cannot be computed a slice at a time: give a "
        "causal language model of a more common kind"
    )


@torch.inference_mode()
def final_states(
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    lengths: Sequence[Sequence[int]],
    *,
    batching: Batching,
    tap: Tap | None = None,
    sample_idxs: Sequence[int] = (),
) -> Tensor:
    """What the head reads, of every token: [N, D], the sequences end to end, on the model's device.

    Args:
        model: in evaluation mode.
        sequences: token ids, [S_i] each, N in all.
        lengths: of the documents of each sequence, which nothing crosses; they add up to S_i.
        batching: of the model.
        tap: listens to the layers.
        sample_idxs: what it is told that the sequences are.
    """
    if batching.rows == "packed":
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
        batching,
        max_tokens=len(sequences) * max(len(ids) for ids in sequences),
        before_batch=announce,
    )


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The model's logits [n, V] float32 of some of its final states [n, D]."""
    with torch.inference_mode():
        headed = _on_states(model)
        return headed(inputs_embeds=states[None], use_cache=False).logits[0].float()


def _on_states(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the same layers, but for a base that answers with what it is given."""
    base = base_of(model)
    *path, last = next(name for name, one in model.named_modules() if one is base).split(".")
    headed = copy.copy(model)
    inner: Any = headed
    for name in path:
        copied = copy.copy(inner._modules[name])
        inner._modules = {**inner._modules, name: copied}
        inner = copied
    inner._modules = {**inner._modules, last: _Answering(base)}
    return headed


class _Answering(nn.Module):
    """A base model that gives its input embeddings out as its last hidden states.

    Args:
        base: that it stands for; a head finds its other attributes there (Falcon-H1's multiplier).
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.__dict__["_base"] = base  # none of its layers

    @property
    def decoder(self) -> _Answering:
        """Itself: OPT's head asks its base model's decoder."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)

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
    output = base_of(model)(
        input_ids=torch.from_numpy(padded).to(model.device),  # [B, S]
        position_ids=torch.from_numpy(places).to(model.device),
        use_cache=False,
    )
    return output.last_hidden_state[torch.from_numpy(mask).to(model.device)]


def _states_of_rows(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    batching: Batching,
    *,
    max_tokens: int,
    before_batch: Callable[[np.ndarray], None],
) -> Tensor:
    """[N, D] of rows that are padded on the right, in their order."""
    starts = np.cumsum([0, *(len(row) for row in rows)]).tolist()
    found: list[Tensor] = []
    places: list[np.ndarray] = []  # of what is found, among all tokens
    for batch in batching.batches(rows, max_tokens=max_tokens):
        padded, mask = pad_batch([rows[i] for i in batch], FILLER_ID)
        real = torch.from_numpy(mask).to(model.device)
        before_batch(batch)
        output = base_of(model)(
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
