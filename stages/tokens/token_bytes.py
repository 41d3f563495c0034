"""What every token id writes into a text: its byte string, whatever the tokenizer's own spelling.

Byte-level BPE spells bytes as characters (GPT-2's table), SentencePiece a space as `▁` and a lone
byte as `<0xNN>`; both are exact. WordPiece keeps neither spaces nor, uncased, letters: `the` stands
for " the", "the", "The". Its decoder writes a space before every token that does not begin with
`##`, so that is what a word's token means here, as BPE's `Ġthe` does: right in running text, wrong
at the start of a text and after a bracket. Marks and Chinese characters are cut out wherever
they stand, mostly with no space before them, and get none. `caveat` says so to the user.

Special tokens are a kind of their own: `<|endoftext|>` the token never equals the thirteen
characters, only a token of that name that the other tokenizer was given too. Added tokens that are
not special (runs of spaces, tags) are ordinary text. The token for what is unknown is no text at
all.

Every table is checked against the tokenizer's own decoder before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.tokens.record import id_to_string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LETTER = re.compile("[A-Za-z]")
_SPACE_SYMBOL = "▁"
# What BERT's pre-tokenizer cuts out as a character of its own, beside punctuation.
_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
_WORDPIECE_CAVEAT = (
    "WordPiece tokens record neither spaces nor what the normaliser changed: a word's token is "
    "taken to begin with a space, a mark's not"
)


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """The byte string of every id from 0 to the highest in use.

    Attributes:
        content: bytes that an id writes; None where it has no token or writes nothing. They need
            not be whole characters.
        special: ids of special tokens, which are no text of their own.
        added: ids of added tokens, special or not.
        shadowed: ids for whose bytes the tokenizer writes another id, `<0x41>` beside `A` say.
        unknown: the id that the tokenizer writes for what it has no other for; None where there is
            none, or nothing that it lacks.
        names: of an added token that writes something else than its name, the name.
        caveat: what is not exact about `content`; None where it is.
    """

    content: tuple[bytes | None, ...]
    special: frozenset[int] = frozenset()
    added: frozenset[int] = frozenset()
    shadowed: frozenset[int] = frozenset()
    unknown: int | None = None
    names: Mapping[int, bytes] = field(default_factory=dict)
    caveat: str | None = None

    def __len__(self) -> int:
        return len(self.content)

    @cached_property
    def keys(self) -> list[bytes | None]:
        """By id, what two tables are compared by: a byte for the kind, then the bytes."""
        keys = self._keys(self.special, {})
        if self.unknown is not None:
            keys[self.unknown] = b"+" + (self.names.get(self.unknown) or b"")
        return keys

    @cached_property
    def text_ids(self) -> dict[bytes | None, int]:
        """The id that the tokenizer writes for these bytes of text."""
        apart = self.special | self.shadowed
        plain = [one for one in range(len(self) - 1, -1, -1) if one not in apart]
        # Of several the lowest, which comes last.
        found = dict(zip(map(self.content.__getitem__, plain), plain, strict=True))
        for token_id in sorted(self.shadowed - self.special):
            found.setdefault(self.content[token_id], token_id)
        found.pop(None, None)
        return found

    @cached_property
    def sha256(self) -> str:
        """Of `keys`: equal for tables whose ids mean the same."""
        return _digest(self.keys)

    @cached_property
    def former_sha256(self) -> str:
        """As releases up to 0.1 read the table: each added token by its name, as if special.

        Caches that they mapped name it.
        """
        return _digest(self._keys(self.added | self.special, self.names))

    def _keys(self, special: frozenset[int], names: Mapping[int, bytes]) -> list[bytes | None]:
        contents = [names.get(idx, data) for idx, data in enumerate(self.content)]
        return [
            None if data is None else (b"+" if token_id in special else b"=") + data
            for token_id, data in enumerate(contents)
        ]


def _digest(keys: Iterable[bytes | None]) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(b"-" if key is None else b"%d:%s" % (len(key), key))
    return digest.hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The byte string of every id of a tokenizer.

    Args:
        tokenizer: byte-level BPE, SentencePiece (BPE or Unigram) or WordPiece, as `tokenizers`
            runs them.

    Raises:
        UserError: for a tokenizer of another kind, or one whose decoder writes something else.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    spelling = _spelling(tokenizer, backend)
    strings = id_to_string(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special}
    names = {token_id: str(token.content).encode() for token_id, token in added.items()}
    content = [_read(string, spelling) for string in strings]
    # A text that holds a special token's name becomes it; so does one that holds an added token
    # of a byte-level vocabulary, which its merges never make.
    by_name = set(special)
    if spelling is _byte_level_bytes:
        by_name |= {
            token_id
            for token_id, token in added.items()
            if backend.model.token_to_id(token.content) is None
        }
    for token_id in by_name:
        content[token_id] = names[token_id]
    unknown = _unknown(tokenizer, backend, content)
    if unknown is not None:
        content[unknown] = None
    ordinary = [
        token_id
        for token_id, data in enumerate(content)
        if data is not None and token_id not in by_name
    ]
    if backend.decoder is not None:
        _check_decoder(backend, content, strings, ordinary, name=type(tokenizer).__name__)
    return TokenBytes(
        content=tuple(content),
        special=frozenset(special),
        added=frozenset(added),
        shadowed=_shadowed(tokenizer, content, special, frozenset(added), strings),
        unknown=unknown,
        names={one: name for one, name in names.items() if content[one] != name},
        caveat=_WORDPIECE_CAVEAT if spelling is _wordpiece_bytes else None,
    )


def byte_level_alphabet() -> Mapping[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + idx): byte for idx, byte in enumerate(others)
    }


_ALPHABET = byte_level_alphabet()


def _spelling(tokenizer: PreTrainedTokenizerBase, backend: Any) -> Callable[[str], bytes]:
    """How the tokenizer spells bytes, as its own settings tell."""
    kind = "no tokenizer.json" if backend is None else type(backend.model).__name__
    if backend is not None:
        decoder, splits, normalizer = (
            json.loads(part.__getstate__()) if part is not None else None
            for part in (backend.decoder, backend.pre_tokenizer, backend.normalizer)
        )
        prefix = getattr(backend.model, "continuing_subword_prefix", None) or ""
        suffix = getattr(backend.model, "end_of_word_suffix", None) or ""
        if kind == "WordPiece" and prefix == "##":
            return _wordpiece_bytes
        parts = {*_types(decoder), *_types(splits)}
        if prefix or suffix:
            kind += f" with {prefix or suffix!r} in its tokens, which its decoder does not write"
        elif kind == "BPE" and "ByteLevel" in parts:
            return _byte_level_bytes
        elif kind in ("BPE", "Unigram") and (
            "Metaspace" in parts or json.dumps(_SPACE_SYMBOL) in json.dumps([normalizer, decoder])
        ):
            return _sentencepiece_bytes
    raise UserError(
        f"{type(tokenizer).__name__} spells its tokens in a way that is not known "
        f"({kind}), expected byte-level BPE, SentencePiece or "
        "WordPiece: align by a tokenizer of these kinds"
    )


def _unknown(
    tokenizer: PreTrainedTokenizerBase, backend: Any, content: Sequence[bytes | None]
) -> int | None:
    """The id that stands for what the tokenizer has no token for."""
    if {bytes([byte]) for byte in range(256)} <= set(content):
        return None
    if type(backend.model).__name__ == "Unigram":
        found = re.search(rb'"unk_id":\s*(\d+)', backend.model.__getstate__()[:200])
        return int(found.group(1)) if found else None
    name = backend.model.unk_token
    return None if name is None else backend.model.token_to_id(name)


def _check_decoder(
    backend: Any,
    content: Sequence[bytes | None],
    strings: Sequence[str | None],
    ordinary: Sequence[int],
    *,
    name: str,
) -> None:
    """Refuse a table that the tokenizer's decoder contradicts, with the first id that it does.

    Each id stands behind a letter, so that nothing is a text's beginning. Bytes that are no whole
    characters no decoder can show. Of WordPiece, whose decoder moves spaces about, the rest is
    compared.

    Raises:
        UserError: naming the id and both spellings.
    """
    wordpiece = type(backend.model).__name__ == "WordPiece"
    contents = ((token_id, content[token_id] or b"") for token_id in ordinary)
    text = {token_id: data.decode() for token_id, data in contents if _is_text(data)}
    letters = (
        token_id
        for token_id, string in text.items()
        if _LETTER.fullmatch(string)
        and backend.decode([token_id, token_id], skip_special_tokens=False).endswith(2 * string)
    )
    anchor = next(letters, None)
    if anchor is None:
        return
    letter = text[anchor]
    begins = len(backend.decode([anchor], skip_special_tokens=False))

    def agrees(ids: Sequence[int]) -> bool:
        run = [one for token_id in ids for one in (token_id, anchor)]
        found = backend.decode([anchor, *run], skip_special_tokens=False)[begins:]
        expected = "".join(text[token_id] + letter for token_id in ids)
        if wordpiece:
            found, expected = found.replace(" ", ""), expected.replace(" ", "")
        return found == expected

    suspects = list(text)
    while not agrees(suspects):
        if len(suspects) == 1:
            token_id = suspects[0]
            shown = backend.decode([anchor, token_id], skip_special_tokens=False)[begins:]
            raise UserError(
                f"{name}'s token {token_id}, {strings[token_id]!r}, reads as {text[token_id]!r} "
                f"and its decoder writes {shown!r}, so what its tokens mean is not known: align by "
                "another tokenizer"
            )
        half = suspects[: len(suspects) // 2]
        suspects = suspects[len(half) :] if agrees(half) else half


def _shadowed(
    tokenizer: PreTrainedTokenizerBase,
    content: Sequence[bytes | None],
    special: set[int],
    added: frozenset[int],
    strings: Sequence[str | None],
) -> frozenset[int]:
    """Of several ids of the same bytes, all but the one that the tokenizer writes.

    It is asked with the bytes by themselves and among letters. Where it writes none of them, the
    first stands, an added token before others and a lone byte's last.
    """
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for token_id, data in enumerate(content):
        if data is not None and token_id not in special:
            groups[data].append(token_id)
    several = {data: ids for data, ids in groups.items() if len(ids) > 1}
    texts = [data.decode() for data in several if _is_text(data)]
    asked = [form.format(text) for text in texts for form in _AROUND]
    found = tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
    written = Counter(
        (text.encode(), one)
        for idx, text in enumerate(texts)
        for row in found[idx * len(_AROUND) : (idx + 1) * len(_AROUND)]
        for one in row
    )

    def stands_back(data: bytes, token_id: int) -> tuple[int, bool, bool, int]:
        is_byte = _BYTE_TOKEN.fullmatch(strings[token_id] or "") is not None
        return -written[data, token_id], token_id not in added, is_byte, token_id

    return frozenset(
        token_id
        for data, ids in several.items()
        for token_id in sorted(ids, key=lambda one: stands_back(data, one))[1:]
    )


_AROUND = ("{}", "a{}a", "a{} a", "a{}")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _types(part: dict[str, Any] | None) -> list[str]:
    """Names of a pre-tokenizer or decoder and of what it is a sequence of."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("decoders") or []
    return [part["type"], *(name for each in inner for name in _types(each))]


def _read(string: str | None, spelling: Callable[[str], bytes]) -> bytes | None:
    return (spelling(string) or None) if string is not None else None


def _byte_level_bytes(string: str) -> bytes:
    if all(character in _ALPHABET for character in string):
        return bytes(_ALPHABET[character] for character in string)
    return string.encode()  # put into the vocabulary by hand: it can only mean itself


def _sentencepiece_bytes(string: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(string)
    if byte:
        return bytes([int(byte.group(1), 16)])
    return string.replace(_SPACE_SYMBOL, " ").encode()


def _wordpiece_bytes(string: str) -> bytes:
    if string.startswith("##"):
        return string[2:].encode()
    return (string if _stands_alone(string) else " " + string).encode()


def _stands_alone(string: str) -> bool:
    """Whether BERT's pre-tokenizer cuts this out of a text wherever it stands."""
    if len(string) != 1:
        return False
    if string.isascii():
        return not string.isalnum()
    if any(first <= ord(string) <= last for first, last in _CHINESE):
        return True
    return unicodedata.category(string).startswith("P")
