"""What a model reads of a text: it is cut to so many tokens, and two texts may read the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teacher_cache.stages.data.tokenization import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model reads text.

    Attributes:
        mask_token: what its tokenizer writes for a masked word; None if it has no such token.
        cut: the part of a text that becomes tokens of a sample.
        ids: those tokens, special ones included.
    """

    mask_token: str | None
    cut: Callable[[str], str]
    ids: Callable[[str], Sequence[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Reading:
        """A tokenizer's, of samples with at most so many tokens.

        A tokenizer that does not know where in the text its tokens lie cuts nothing here.
        """

        def ids(text: str) -> Sequence[int]:
            return token_ids([text], tokenizer, max_length=max_length)[0]

        def cut(text: str) -> str:
            if not tokenizer.is_fast:
                return text
            encoded = tokenizer(
                text,
                truncation=True,
                max_length=max_length,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                verbose=False,
            )
            places = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
            read = [place for place, is_special in places if not is_special]
            return text[read[0][0] : read[-1][1]] if read else ""

        mask = tokenizer.mask_token
        return cls(mask_token=mask if isinstance(mask, str) else None, cut=cut, ids=ids)
