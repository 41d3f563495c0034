"""From documents to samples: the token ids that a teacher sees, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.labels import Label

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
        token_types: uint8 [S], which text of a pair each token is of, as its tokenizer numbers
            them; None where they are not asked for.
    """

    sample_id: bytes
    input_ids: np.ndarray
    label: Label | None
    was_truncated: bool
    token_types: np.ndarray | None = None


def tokenize(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    with_types: bool = False,
) -> list[Sample]:
    """Tokenise documents with special tokens, cutting those that are too long.

    Whitespace-only documents are left out, and those of which the tokenizer leaves nothing. A pair
    is read as the tokenizer reads one, and cut as it cuts one: a token at a time of the longer
    text.

    Args:
        documents: in any number; batched here.
        tokenizer: the teacher's; its own settings for padding and truncation do not matter but
            for the side on which it truncates.
        max_length: the most tokens a sample may have, special tokens included.
        with_types: whether the token types of pairs are asked for.

    Returns:
        The samples in the order of their documents.

    Raises:
        UserError: if `max_length` leaves no room for a token of the text.
    """
    whole = [document for document in documents if not document.is_empty]
    num_texts = max([1, *(len(document.texts) for document in whole)])
    num_special = tokenizer.num_special_tokens_to_add(pair=num_texts > 1)
    if max_length < num_special + num_texts:
        raise UserError(
            f"--max-length {max_length} leaves no room for text: the tokenizer adds {num_special} "
            f"special tokens, so give at least {num_special + num_texts}"
        )
    samples: list[Sample] = []
    for start in range(0, len(whole), _BATCH_DOCUMENTS):
        batch = whole[start : start + _BATCH_DOCUMENTS]
        samples += _tokenize_batch(batch, tokenizer, max_length, with_types)
    return samples


def _tokenize_batch(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    with_types: bool,
) -> list[Sample]:
    texts = [document.texts for document in documents]
    found = list(_encoded(texts, tokenizer, max_length=None, with_types=with_types))
    # The tokenizer itself cuts the long ones: only it knows its special tokens and its side.
    long_idx = [idx for idx, one in enumerate(found) if len(one["input_ids"]) > max_length]
    if long_idx:
        long = [texts[idx] for idx in long_idx]
        cut = _encoded(long, tokenizer, max_length=max_length, with_types=with_types)
        for idx, one in zip(long_idx, cut, strict=True):
            found[idx] = one
    truncated = set(long_idx)
    return [
        Sample(
            sample_id=document.sample_id,
            input_ids=np.asarray(one["input_ids"], dtype=np.uint32),
            label=document.label,
            was_truncated=idx in truncated,
            token_types=np.asarray(one["token_type_ids"], np.uint8) if with_types else None,
        )
        for idx, (document, one) in enumerate(zip(documents, found, strict=True))
        if one["input_ids"]
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
    singles = [(text,) for text in texts]
    return [one["input_ids"] for one in _encoded(singles, tokenizer, max_length=max_length)]


def _encoded(
    texts: Sequence[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    with_types: bool = False,
) -> Sequence[Mapping[str, list[int]]]:
    """What a tokenizer makes of each document, all of them single texts or all pairs."""
    if not texts:
        return []
    encoded: Any = tokenizer(
        *(list(side) for side in zip(*texts, strict=True)),
        add_special_tokens=True,
        padding=False,
        truncation=max_length is not None,  # of a pair: the longer text first
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=with_types,
        verbose=False,
    )
    names = ["input_ids", *(["token_type_ids"] if with_types else [])]
    return [{name: encoded[name][idx] for name in names} for idx in range(len(texts))]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model reads text.

    Attributes:
        mask_token: what its tokenizer writes for a masked word; None if it has no such token.
        cut: of a text, or of both of a pair, the parts that become tokens of a sample.
        ids: those tokens, special ones included.
    """

    mask_token: str | None
    cut: Callable[..., tuple[str, ...]]
    ids: Callable[..., Sequence[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Reading:
        """A tokenizer's, of samples with at most so many tokens.

        A tokenizer that does not know where in the text its tokens lie cuts nothing here.
        """

        def ids(*texts: str) -> Sequence[int]:
            return _encoded([texts], tokenizer, max_length=max_length)[0]["input_ids"]

        def cut(*texts: str) -> tuple[str, ...]:
            if not tokenizer.is_fast:
                return texts
            encoded = tokenizer(
                *texts,
                truncation=True,
                max_length=max_length,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                verbose=False,
            )
            places, special = encoded["offset_mapping"], encoded["special_tokens_mask"]
            # Of a pair both texts' places begin at 0.
            sides = encoded.sequence_ids() if len(texts) > 1 else [0] * len(places)
            found = []
            for side, text in enumerate(texts):
                read = [
                    place
                    for place, is_special, of in zip(places, special, sides, strict=True)
                    if not is_special and of == side
                ]
                found.append(text[read[0][0] : read[-1][1]] if read else "")
            return tuple(found)

        mask = tokenizer.mask_token
        return cls(mask_token=mask if isinstance(mask, str) else None, cut=cut, ids=ids)
