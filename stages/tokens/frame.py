"""What a tokenizer puts around a text: a begin before it, a separator or the end behind it.

A frame is no text. SentencePiece and WordPiece also begin a text's first token with a space that
the text has not; it is no text either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.tokens.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS = "aAC1"  # what nearly every tokenizer has a token for
_NUM_TRIED = 1000

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The tokens around a text.

    Attributes:
        before: ids before it.
        after: ids behind it.
        end_id: of the end of text; None where the tokenizer has none.
    """

    before: Ids
    after: Ids
    end_id: int | None

    @property
    def ends(self) -> tuple[Ids, ...]:
        """What may stand behind a text, the longest first; the end of text is in the first ones."""
        end = () if self.end_id is None else (self.end_id,)
        several = ((*self.after, *end), end, self.after)
        return tuple(dict.fromkeys(one for one in several if one))

    @property
    def stop_ids(self) -> Ids:
        """With any of these begins what stands behind a text: no more text comes."""
        return tuple(dict.fromkeys(one[0] for one in self.ends))

    def without_end(self, ids: list[int]) -> list[int]:
        """A text's ids with nothing behind them."""
        for ending in self.ends:
            if len(ids) > len(ending) and tuple(ids[-len(ending) :]) == ending:
                return ids[: -len(ending)]
        return ids

    def with_one_begin(self, ids: list[int]) -> list[int]:
        """The ids of a text that spells the begin itself, as chat templates do: with one of two."""
        num = len(self.before)
        is_twice = num and tuple(ids[: 2 * num]) == 2 * self.before
        return ids[num:] if is_twice else ids


def surroundings(tokenizer: PreTrainedTokenizerBase) -> Surroundings:
    """What a tokenizer puts around a text.

    Raises:
        UserError: if it makes no token of any text that was tried.
    """
    _, before, _, after = _around_a_letter(tokenizer)
    return Surroundings(before=before, after=after, end_id=_end_id(tokenizer))


def reads_letters_alone(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a letter becomes the token of that letter, and nothing stands around it."""
    letter, before, inner, after = _around_a_letter(tokenizer)
    alone = tokenizer.convert_ids_to_tokens(list(inner)) == [letter]
    return alone and not before and not after


def _around_a_letter(tokenizer: PreTrainedTokenizerBase) -> tuple[str, Ids, Ids, Ids]:
    """A letter that the tokenizer knows; the ids before it, its own, and those behind."""
    for texts in (_LETTERS, _words(tokenizer)):
        for text in texts:
            before, inner, after = _parts(tokenizer, text)
            if inner:
                return text, before, inner, after
    raise UserError(
        f"{type(tokenizer).__name__} makes no token of any letter or word of its own, so what it "
        "puts around a text is not known: give a tokenizer that reads text"
    )


def _words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Of its own tokens the letters, the shortest first."""
    strings = ("".join(filter(str.isalnum, string)) for string in tokenizer.get_vocab())
    yield from islice(sorted(filter(None, strings), key=len), _NUM_TRIED)


def _parts(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Ids, Ids, Ids]:
    """The ids before a text, its own and those behind; its own are empty where there are none."""
    encoded: Any = tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True)
    ids, added = tuple(map(int, encoded["input_ids"])), list(encoded["special_tokens_mask"])
    if 0 not in added:
        return ids, (), ()
    first, stop = added.index(0), len(added) - added[::-1].index(0)
    return ids[:first], ids[first:stop], ids[stop:]


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None


@dataclass(frozen=True, kw_only=True)
class Frame(Surroundings):
    """The tokens around a text, and the space that some tokenizers put before it.

    Attributes:
        adds_space: whether a text's first token has a space that the text has not.
        adds_to_space: whether it has one more even where the text begins with one.
    """

    adds_space: bool
    adds_to_space: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, table: TokenBytes) -> Frame:
        """A tokenizer's, as one letter shows it.

        Raises:
            UserError: if it makes no token of any text that was tried.
        """
        letter, before, inner, after = _around_a_letter(tokenizer)
        _, behind_space, _ = _parts(tokenizer, f" {letter}")
        spelt, spelt_behind_space = (
            b"".join(table.content[one] or b"" for one in ids) for ids in (inner, behind_space)
        )
        return cls(
            before=before,
            after=after,
            end_id=_end_id(tokenizer),
            adds_space=spelt.startswith(b" "),
            adds_to_space=spelt_behind_space.startswith(b"  "),
        )

    def has_added_space(self, spelt: bytes) -> bool:
        """Whether what a text's tokens spell begins with a space that the text has not.

        Where none is added to a text's own, one space at its beginning may be either; it is taken
        for the tokenizer's, as most texts begin with none.
        """
        is_added = self.adds_to_space or not spelt.startswith(b"  ")
        return self.adds_space and spelt.startswith(b" ") and is_added
