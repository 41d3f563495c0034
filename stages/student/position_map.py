"""How a sample's positions are reordered for a causal student that pools at the last one.

A causal scan's first position has seen nothing, so a classification token that stands first (BERT)
goes last, and a tokenizer without one (GPT-2) gets its end-of-text token appended. Training,
prediction and pipelines share this one function: the model applies it itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError, did_you_mean

MODES = ("identity", "move_first_to_last", "append")
APPENDED = -1
"""Source index of a token that the sample does not have."""


@dataclass(frozen=True, kw_only=True)
class PositionMap:
    """A permutation of a sample's positions, plus at most one appended token.

    Attributes:
        mode: "identity", "move_first_to_last" or "append".
        token_id: the token that "append" adds; none in the other modes.
    """

    mode: str = "identity"
    token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown mode, and a token id that is missing or has no use."""
        if self.mode not in MODES:
            raise UserError(
                f"There is no position map {self.mode!r}: {did_you_mean(self.mode, MODES)}"
            )
        if (self.token_id is None) == (self.mode == "append"):
            raise UserError(
                f"The position map {self.mode!r} has token_id {self.token_id}: give one for "
                "'append' and only there."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; `from_dict` reads them."""
        if self.token_id is None:
            return {"mode": self.mode}
        return {"mode": self.mode, "token_id": self.token_id}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PositionMap:
        """Read what `to_dict` wrote.

        Raises:
            UserError: if a key or the mode is unknown, or the token id does not fit the mode.
        """
        for key in values:
            if key not in ("mode", "token_id"):
                raise UserError(
                    f"A position map has no {key!r}: {did_you_mean(key, ('mode', 'token_id'))}"
                )
        return cls(**values)

    def source_positions(self, length: int) -> np.ndarray:
        """Where each position of a mapped sample comes from.

        Args:
            length: S, real tokens of the sample, at least 1.

        Returns:
            [S] int64, or [S + 1] for "append": indices into the sample, -1 for the appended token.

        Raises:
            ValueError: if `length` is below 1.
        """
        if length < 1:
            raise ValueError(f"a sample has at least 1 token, not {length}")
        source = np.arange(length)
        if self.mode == "move_first_to_last":
            return np.roll(source, -1)
        return np.append(source, APPENDED) if self.mode == "append" else source

    def check(self, length: int) -> None:
        """Make sure that no token is lost or doubled and at most one is appended.

        Args:
            length: S, real tokens of the sample.

        Raises:
            ValueError: if the map is anything but a permutation and at most one appended token.
        """
        source = self.source_positions(length)
        kept = np.sort(source[source != APPENDED])
        if not np.array_equal(kept, np.arange(length)) or len(source) - length not in (0, 1):
            raise ValueError(f"{self} is no permutation of {length} positions: {source.tolist()}")

    def apply(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Reorder a batch of samples of different lengths, and pad them on the right.

        Args:
            input_ids: [B, S] integers.
            attention_mask: [B, S] bool, True at real tokens, wherever in the row they stand
                (padded left or right); at least one in each row.

        Returns:
            Token ids [B, S'] and their mask [B, S'] bool: the real tokens first, in the order of
            `source_positions`. S' is S, or S + 1 for "append". The ids at padding mean nothing.
        """
        batch, width = input_ids.shape
        num_real = attention_mask.sum(dim=1, keepdim=True)  # [B, 1]
        compact = real_first(attention_mask)
        position = torch.arange(width, device=input_ids.device).expand(batch, width)
        if self.mode == "move_first_to_last":
            position = torch.where(position < num_real, (position + 1) % num_real, position)
        input_ids = input_ids.gather(1, compact.gather(1, position))
        if self.token_id is not None:
            input_ids = F.pad(input_ids, (0, 1)).scatter(1, num_real, self.token_id)
            num_real = num_real + 1
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return input_ids, position < num_real

    def sources(self, attention_mask: Tensor) -> Tensor:
        """Where each position of a mapped batch comes from: `apply` to the positions themselves.

        Args:
            attention_mask: [B, S] bool, as `apply` takes it.

        Returns:
            [B, S'] int64, indices along S; `APPENDED` at the appended token and at padding.
        """
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        of_positions = self if self.token_id is None else replace(self, token_id=APPENDED)
        sources, mask = of_positions.apply(positions.expand_as(attention_mask), attention_mask)
        return sources.masked_fill(~mask, APPENDED)


def real_first(mask: Tensor) -> Tensor:
    """The index that puts each row's real positions in front, in their order, and padding behind.

    Args:
        mask: [B, S] bool, True at real positions, wherever in the row they stand.

    Returns:
        [B, S] int64; a permutation of each row's positions.
    """
    position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.zeros_like(position).scatter(1, places_of(mask), position)


def places_of(mask: Tensor) -> Tensor:
    """Where each position [B, S] stands once the real ones are in front: undoes `real_first`."""
    num_real = mask.sum(dim=1, keepdim=True)
    padding = mask.logical_not()
    return torch.where(mask, mask.cumsum(1) - 1, num_real + padding.cumsum(1) - 1)


def choose(tokenizer: PreTrainedTokenizerBase, pooling: str) -> PositionMap:
    """The map that puts a token that has seen the whole sample where the student pools.

    Args:
        tokenizer: the student's; asked where it puts its classification token by an example.
        pooling: "cls", "mean" or "last"; only "cls" needs a token of its own.

    Returns:
        Move the first token to the end, append an end-of-text token, or change nothing.

    Raises:
        UserError: if the tokenizer has neither a classification nor an end-of-text token, or
            puts the classification token amid the text.
    """
    if pooling != "cls":
        return PositionMap()
    cls_id, eos_id = tokenizer.cls_token_id, tokenizer.eos_token_id
    ids = list(tokenizer("a")["input_ids"])
    last = ids[-1] if ids else None
    if cls_id is not None and cls_id in ids:
        if last == cls_id:
            return PositionMap()
        if ids[0] == cls_id:
            return PositionMap(mode="move_first_to_last")
        raise UserError(
            f"The tokenizer puts its classification token at position {ids.index(cls_id)} of "
            f"{len(ids)}, neither first nor last: use --pooling mean or last."
        )
    if not isinstance(eos_id, int):
        raise UserError(
            "The tokenizer adds no classification token and has no end-of-text token to pool at: "
            "use --pooling mean or last, or another tokenizer."
        )
    return PositionMap() if last == eos_id else PositionMap(mode="append", token_id=eos_id)
