"""What every token id writes into a text: its byte string, whatever the tokenizer's own spelling.

Byte-level BPE spells bytes as characters (GPT-2's table), SentencePiece a space as `▁` and a lone
byte as `<0xNN>`; both are exact. WordPiece keeps neither spaces nor, uncased, letters: `the` stands
for " the", "the", "The". Its decoder writes a space before every token that does not begin with
`##`, so that is what a word's token means here, as BPE's `Ġthe` does: right in running text, wrong
at the start of a text and after a bracket. Marks and Chinese characters are cut out wherever
they stand, mostly with no space before them, and get none. `caveat` says so to the user.

Added tokens are a kind of their own: `<|endoftext|>` the token never equals the thirteen
characters, only a token of that name that the other tokenizer was given too.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.tokens.record import id_to_string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
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
        added: ids of added tokens, special or not.
        single_bytes: ids of `<0xNN>` tokens, which a tokenizer uses where it has no other.
        caveat: what is not exact about `content`; None where it is.
    """

    content: tuple[bytes | None, ...]
    added: frozenset[int] = frozenset()
    single_bytes: frozenset[int] = frozenset()
    caveat: str | None = None

    def __len__(self) -> int:
        return len(self.content)

    @cached_property
    def keys(self) -> list[bytes | None]:
        """By id, what two tables are compared by: a byte for the kind, then the bytes."""
        return [
            None if data is None else (b"+" if token_id in self.added else b"=") + data
            for token_id, data in enumerate(self.content)
        ]

    @cached_property
    def sha256(self) -> str:
        """Of `keys`: equal for tables whose ids mean the same."""
        digest = hashlib.sha256()
        for key in self.keys:
            digest.update(b"-" if key is None else b"%d:%s" % (len(key), key))
        return digest.hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The byte string of every id of a tokenizer.

    Args:
        tokenizer: byte-level BPE, SentencePiece (BPE or Unigram) or WordPiece, as `tokenizers`
            runs them.

    Raises:
        UserError: for a tokenizer of another kind.
    """
    spelling = _spelling(tokenizer)
    strings = id_to_string(tokenizer)
    added = {
        token_id: str(token.content).encode()
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    content: list[bytes | None] = [
        added[token_id] if token_id in added else _read(string, spelling)
        for token_id, string in enumerate(strings)
    ]
    single_bytes = {
        token_id
        for token_id, string in enumerate(strings)
        if spelling is _sentencepiece_bytes and string and _BYTE_TOKEN.fullmatch(string)
    }
    return TokenBytes(
        content=tuple(content),
        added=frozenset(added),
        single_bytes=frozenset(single_bytes - added.keys()),
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


def _spelling(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """How the tokenizer spells bytes, as its own settings tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = settings.get("model", {})
    if model.get("type") == "WordPiece" and model.get("continuing_subword_prefix") == "##":
        return _wordpiece_bytes
    parts = set(_types(settings.get("decoder"))) | set(_types(settings.get("pre_tokenizer")))
    if model.get("type") == "BPE" and "ByteLevel" in parts:
        return _byte_level_bytes
    replaced = json.dumps([settings.get("normalizer"), settings.get("decoder")])
    spaces = "Metaspace" in parts or json.dumps(_SPACE_SYMBOL) in replaced
    if model.get("type") in ("BPE", "Unigram") and spaces:
        return _sentencepiece_bytes
    raise UserError(
        f"{type(tokenizer).__name__} spells its tokens in a way that is not known "
        f"({model.get('type', 'no tokenizer.json')}), expected byte-level BPE, SentencePiece or "
        "WordPiece: align by a tokenizer of these kinds"
    )


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
    if string.startswith("##") and len(string) > 2:
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
