"""Tokenizers that come inside the packaged models, converted once to what transformers loads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import IO, Any

from teacher_cache.cache.commit import write_bytes_atomically, write_json_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packaged.packages import assets_folder, fetch

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_TOKENIZER_FILE = "tokenizer.json"
_CONTROL = 3  # llama.cpp's token type of what stands for no text

_GGUF_MAGIC = b"GGUF"
_GGUF_VERSIONS = (2, 3)
# Types of values, by llama.cpp's number: a code of `struct`, or a string or array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9


def smollm2_tokenizer_folder() -> Path:
    """The folder of SmolLM2's tokenizer in the assets, made from the GGUF when it is not there.

    Raises:
        UserError: if the package cannot be fetched, or its file holds another kind of tokenizer.
    """
    folder = assets_folder() / "smollm2-tokenizer"
    if not (folder / _TOKENIZER_FILE).is_file():
        with (fetch("smollm2") / SMOLLM2_FILE).open("rb") as stream:
            metadata = read_metadata(stream)
        settings = json.dumps(_settings(metadata), ensure_ascii=False) + "\n"
        write_json_atomically(folder / "tokenizer_config.json", _config(metadata))
        write_bytes_atomically(folder / _TOKENIZER_FILE, settings.encode())
    return folder


def _settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the byte-level BPE that llama.cpp calls `smollm`: each digit on its own."""
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(f"the GGUF file's tokenizer is {kind}, expected gpt2 with smollm's splits")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, token in enumerate(tokens)
            if types[token_id] == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {
        "bos_token": "tokenizer.ggml.bos_token_id",
        "eos_token": "tokenizer.ggml.eos_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id",
        "pad_token": "tokenizer.ggml.padding_token_id",
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        **{role: tokens[metadata[key]] for role, key in roles.items()},
    }


def read_metadata(stream: IO[bytes]) -> dict[str, Any]:
    """A GGUF header's values by key; the stream is left where the tensors' descriptions begin.

    The format is llama.cpp's: magic, version, counts, then key, type and value, little-endian.

    Args:
        stream: a GGUF file, at its beginning.

    Raises:
        UserError: if it is no GGUF file of version 2 or 3, or ends too early.
    """
    found = stream.read(4)
    if found != _GGUF_MAGIC:
        raise UserError(f"the file begins with {found!r}, expected GGUF: give a GGUF model")
    version = _scalar(stream, "I")
    if version not in _GGUF_VERSIONS:
        raise UserError(f"the GGUF file is of version {version}: convert it to version 3")
    _num_tensors, num_values = _scalar(stream, "Q"), _scalar(stream, "Q")
    return {
        _string(stream).decode(): _value(stream, _scalar(stream, "I")) for _ in range(num_values)
    }


def _value(stream: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _string(stream).decode()
    if kind == _ARRAY:
        item_kind, length = _scalar(stream, "I"), _scalar(stream, "Q")
        return [_value(stream, item_kind) for _ in range(length)]
    if kind not in _SCALARS:
        raise UserError(f"the GGUF file holds a value of unknown type {kind}: convert it again")
    return _scalar(stream, _SCALARS[kind])


def _string(stream: IO[bytes]) -> bytes:
    return _bytes(stream, _scalar(stream, "Q"))


def _scalar(stream: IO[bytes], code: str) -> Any:
    layout = "<" + code
    return struct.unpack(layout, _bytes(stream, struct.calcsize(layout)))[0]


def _bytes(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise UserError("the GGUF file ends within its header: download it again")
    return data
