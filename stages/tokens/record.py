"""What a tokenizer is, written down so that another can be compared with it later."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from teacher_cache.cache.commit import canonical_json
from teacher_cache.stages.config import StageConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers writes 1e30 where a tokenizer names no limit.
_UNLIMITED = 10**20
# Longer settings (a SentencePiece character map, say) are recorded by their hash.
_MAX_SETTING_CHARACTERS = 300
# What the last call left behind, and where the tokenizer was loaded from: not what it does.
_CALL_STATE = ("truncation", "padding")
_LOAD_STATE = ("is_local", "local_files_only")


class TokenizationRecord(StageConfig):
    """How the cached token ids were made; `tokenization.json` in the cache."""

    tokenizer_class: str = Field(description="class that the tokenizer's files name")
    files_sha256: str = Field(
        description="of tokenizer.json without its truncation and padding sections, which are "
        "state of the last call; of all saved files for a tokenizer without tokenizer.json"
    )
    sections: dict[str, str] = Field(
        description="sha256 of each section of tokenizer.json (or of each file), to say where two "
        "tokenizers part"
    )
    normalizer: str = Field(description="canonical JSON, or type and hash where that is long")
    pre_tokenizer: str = Field(description="canonical JSON, or type and hash where that is long")
    special_tokens: dict[str, tuple[str, int | None]] = Field(
        description="role (cls_token, ...; extra_0, ... for those without) to string and id"
    )
    vocab_size: int = Field(description="ids of the id-to-string table, added tokens included")
    id_to_string_sha256: str = Field(description="of the table's canonical JSON")
    max_length: int = Field(description="tokens at which cached documents were truncated")
    model_max_length: int | None = Field(
        description="tokens that the tokenizer says its model takes; null where it names no limit"
    )
    padding_side: str = Field(description="left or right")
    truncation_side: str = Field(description="left or right")
    pair_form: str | None = Field(
        default=None,
        exclude_if=lambda form: form is None,  # records of single texts stay as they were
        description="of pairs, the tokens of the pair `a` and `b`",
    )


def describe(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int, pairs: bool = False
) -> TokenizationRecord:
    """Record everything of a tokenizer that decides which ids a text becomes.

    Two tokenizers with equal records are interchangeable; calls between do not change a record.

    Args:
        tokenizer: any of transformers' tokenizers.
        max_length: tokens at which its user truncates, special tokens included.
        pairs: whether it reads pairs of texts.
    """
    saved = _save(tokenizer)
    sections = _sections(saved)
    table = id_to_string(tokenizer)
    settings = saved.ours.get("tokenizer.json", {})
    return TokenizationRecord(
        tokenizer_class=saved.ours["tokenizer_config.json"]["tokenizer_class"],
        files_sha256=_sha256(canonical_json(sections)),
        sections=sections,
        normalizer=_short(settings.get("normalizer")),
        pre_tokenizer=_short(settings.get("pre_tokenizer")),
        special_tokens=_special_tokens(tokenizer),
        vocab_size=len(table),
        id_to_string_sha256=table_sha256(table),
        max_length=max_length,
        model_max_length=_limit(tokenizer),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        pair_form=pair_form(tokenizer) if pairs else None,
    )


def pair_form(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands around and between the texts of a pair: `[CLS] a [SEP] b [SEP]`, say."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"]))


def id_to_string(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The token string of every id from 0 to the highest in use; None for an id without one."""
    vocabulary = tokenizer.get_vocab()
    table: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for string, token_id in vocabulary.items():
        table[token_id] = string
    return table


def table_sha256(table: list[str | None]) -> str:
    """The hash by which two id-to-string tables are told apart."""
    return _sha256(canonical_json(table))


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What `save_pretrained` writes, by file name.

    Attributes:
        ours: files that are written anew, as values that depend on the tokenizer alone.
        others: files that are kept as they are.
    """

    ours: dict[str, dict[str, Any]]
    others: dict[str, bytes]

    def files(self) -> dict[str, bytes]:
        """All of them, in bytes."""
        return self.others | {name: _readable(value) for name, value in self.ours.items()}


def canonical_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """What `save_pretrained` writes, by file name, in bytes that depend on the tokenizer alone.

    The sides, and the model's maximum length, are written out, so that a value set by hand after
    loading comes back with the files.
    """
    return _save(tokenizer).files()


def _save(tokenizer: PreTrainedTokenizerBase) -> _Saved:
    with tempfile.TemporaryDirectory(prefix="teacher-cache-tokenizer-") as temporary:
        tokenizer.save_pretrained(temporary)
        folder = Path(temporary)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    config: dict[str, Any] = json.loads(files.pop("tokenizer_config.json"))
    for key in _LOAD_STATE:
        config.pop(key, None)
    config["padding_side"] = tokenizer.padding_side
    config["truncation_side"] = tokenizer.truncation_side
    ours = {"tokenizer_config.json": config}
    if "tokenizer.json" in files:
        ours["tokenizer.json"] = json.loads(files.pop("tokenizer.json"))
        ours["tokenizer.json"].update(dict.fromkeys(_CALL_STATE))
    return _Saved(ours=ours, others=files)


def _sections(saved: _Saved) -> dict[str, str]:
    """Hash of each part of the tokenizer that has a name of its own."""
    settings = saved.ours.get("tokenizer.json")
    if settings:
        return {
            name: _sha256(canonical_json(value))
            for name, value in settings.items()
            if name not in _CALL_STATE
        }
    files = saved.files()
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, int | None]]:
    roles = {
        role: string
        for role, string in tokenizer.special_tokens_map.items()
        if isinstance(string, str)
    }
    extra = [string for string in tokenizer.all_special_tokens if string not in roles.values()]
    roles |= {f"extra_{idx}": string for idx, string in enumerate(extra)}
    vocabulary = tokenizer.get_vocab()
    return {role: (string, vocabulary.get(string)) for role, string in roles.items()}


def _limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.model_max_length > _UNLIMITED else int(tokenizer.model_max_length)


def _short(setting: dict[str, Any] | None) -> str:
    text = canonical_json(setting)
    if setting is None or len(text) <= _MAX_SETTING_CHARACTERS:
        return text
    return f"{setting.get('type')} (sha256 {_sha256(text)[:16]})"


def _readable(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
