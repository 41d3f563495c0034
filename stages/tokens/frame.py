"""What a tokenizer puts around a text: a begin before it, a separator or the end behind it.

A frame is no text. SentencePiece and WordPiece also begin a text's first token with a space that
the text has not; it is no text either. Some do so again behind each added token of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

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
        several = dict.fromkeys(one for one in ((*self.after, *end), end, self.after) if one)
        return tuple(sorted(several, key=len, reverse=True))

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


def _is_white(content: bytes | None) -> bool:
    return content is not None and not content.strip()


def unseen_spaces(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Names of added tokens behind which one space leaves no trace, and whether they are special.

    The empty name is a text's beginning. SentencePiece puts a space before a text, and some of its
    kind behind an added token in one, unless there is one: the tokens do not tell which.
    """
    letter, *_ = _around_a_letter(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    names = {"": True} | {token.content: bool(token.special) for token in added}
    texts = [f"{name}{space}{letter}" for name in names for space in ("", " ")]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    pairs = zip(names, rows[::2], rows[1::2], strict=True)
    return {name: names[name] for name, without, with_one in pairs if without == with_one}


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
        spaced: ids behind which a text goes on as it begins, with that space.
    """

    adds_space: bool
    adds_to_space: bool = False
    spaced: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, table: TokenBytes) -> Frame:
        """A tokenizer's, as one letter shows it, and the letter around each of its added tokens.

        Raises:
            UserError: if it makes no token of any text that was tried.
        """
        letter, before, inner, after = _around_a_letter(tokenizer)
        _, behind_space, _ = _parts(tokenizer, f" {letter}")
        spelt, spelt_behind_space = (
            b"".join(table.content[one] or b"" for one in ids) for ids in (inner, behind_space)
        )
        adds_space = spelt.startswith(b" ")
        adds_to_space = spelt_behind_space.startswith(b"  ")
        spaced: frozenset[int] = frozenset()
        if adds_space and table.caveat is None:  # WordPiece's words have one wherever they stand
            spaced = _spaced(tokenizer, table, letter, is_told=adds_to_space)
        return cls(
            before=before,
            after=after,
            end_id=_end_id(tokenizer),
            adds_space=adds_space,
            adds_to_space=adds_to_space,
            spaced=spaced,
        )

    def added_spaces(
        self, ids: Sequence[int], contents: Sequence[bytes], *, begins: bool
    ) -> np.ndarray:
        """Which tokens of a piece begin with a space that the text has not, bool [S].

        Where none is added to a text's own, one space at its beginning may be either; it is taken
        for the tokenizer's, as most texts begin with none.

        Args:
            ids: [S] without the frame.
            contents: [S] bytes that they write.
            begins: whether a text begins with the first.
        """
        found = np.zeros(len(ids), dtype=bool)
        for start in self.starts(ids):
            spelt = b"".join(contents[start : start + 2])
            is_added = self.adds_to_space or not spelt.startswith(b"  ")
            if (start or begins) and contents[start].startswith(b" ") and is_added:
                found[start] = True
        return found

    def starts(self, ids: Sequence[int]) -> list[int]:
        """Tokens of a piece, without the frame, that may begin with a space that the text lacks."""
        if not self.adds_space or not len(ids):
            return []
        return [0, *(idx + 1 for idx, one in enumerate(ids[:-1]) if one in self.spaced)]


def _spaced(
    tokenizer: PreTrainedTokenizerBase, table: TokenBytes, letter: str, *, is_told: bool
) -> frozenset[int]:
    """Added tokens behind which a text goes on as it begins.

    Not the one for what is unknown, which stands in the middle of words. Where a space behind one
    may as well be the text's, it is taken for the tokenizer's behind a special token and behind
    white space, as templates and code put none there; behind a mark (XLNet's `.`) for the text's.
    """
    names = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token_id != table.unknown
        and (token.special or is_told or _is_white(table.content[token_id]))
    }
    texts = [f"{letter}{name}{letter}" for name in names.values()]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    behind = {
        token_id: row[row.index(token_id) + 1 :]
        for token_id, row in zip(names, rows, strict=True)
        if token_id in row
    }
    return frozenset(
        token_id
        for token_id, ids in behind.items()
        if ids and (table.content[ids[0]] or b"").startswith(b" ")
    )
