"""From documents to samples: the token ids that a teacher sees, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BATCH_DOCUMENTS = 512


@dataclass(frozen=True, eq=False)
class Sample:
    """The unit of caching.

    Attributes:
        sample_id: 16 bytes, the document's.
        input_ids: uint32 [S], special tokens included, no padding.
        label: the class id, None in an unlabelled corpus.
        was_truncated: whether the document had more tokens.
    """

    sample_id: bytes
    input_ids: np.ndarray
    label: int | None
    was_truncated: bool


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Sample]:
    """Tokenise documents with special tokens, cutting those that are too long.

    Whitespace-only documents are left out, and those of which the tokenizer leaves nothing.

    Args:
        documents: in any number; batched here.
        tokenizer: the teacher's; its own settings for padding and truncation do not matter but
            for the side on which it truncates.
        max_length: the most tokens a sample may have, special tokens included.

    Returns:
        The samples in the order of their documents.

    Raises:
        UserError: if `max_length` leaves no room for a token of the text.
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= num_special:
        raise UserError(
            f"--max-length {max_length} leaves no room for text: the tokenizer adds {num_special} "
            f"special tokens, so give at least {num_special + 1}"
        )
    texts = [document for document in documents if document.text.strip()]
    samples: list[Sample] = []
    for start in range(0, len(texts), _BATCH_DOCUMENTS):
        samples += _tokenize_batch(texts[start : start + _BATCH_DOCUMENTS], tokenizer, max_length)
    return samples


def _tokenize_batch(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Sample]:
    ids = token_ids([document.text for document in documents], tokenizer, max_length=None)
    # The tokenizer itself cuts the long ones: only it knows its special tokens and its side.
    long_idx = [idx for idx, tokens in enumerate(ids) if len(tokens) > max_length]
    if long_idx:
        texts = [documents[idx].text for idx in long_idx]
        cut = token_ids(texts, tokenizer, max_length=max_length)
        for idx, tokens in zip(long_idx, cut, strict=True):
            ids[idx] = tokens
    truncated = set(long_idx)
    return [
        Sample(
            sample_id=document.sample_id,
            input_ids=np.asarray(tokens, dtype=np.uint32),
            label=document.label,
            was_truncated=idx in truncated,
        )
        for idx, (document, tokens) in enumerate(zip(documents, ids, strict=True))
        if tokens
    ]


def token_ids(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> list[list[int]]:
    """The ids of each text, special tokens included.

    Args:
        texts: tokenised together.
        tokenizer: whose own settings for padding and truncation do not matter but for the side.
        max_length: cuts longer ones; None cuts nothing.
    """
    encoded = tokenizer(
        texts,
        add_special_tokens=True,
        padding=False,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


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
