from __future__ import annotations

import io
import struct

import pytest

from benchmarks.packaged_tokenizers import read_metadata
from teacher_cache.cache.errors import UserError


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _file(*values: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 7, len(values)) + b"".join(values)


FILE = _file(
    _string("name") + struct.pack("<I", 8) + _string("smöl"),
    _string("layers") + struct.pack("<II", 4, 30),
    _string("bos") + struct.pack("<I?", 7, False),
    _string("tokens") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string(""),
    _string("types") + struct.pack("<IIQiii", 9, 5, 3, 1, -3, 6),
)


def test_reads_strings_numbers_and_lists_and_stops_before_the_tensors() -> None:
    stream = io.BytesIO(FILE + b"tensors")
    assert read_metadata(stream) == {
        "name": "smöl",
        "layers": 30,
        "bos": False,
        "tokens": ["a", ""],
        "types": [1, -3, 6],
    }
    assert stream.read() == b"tensors"


def test_every_cut_is_noticed() -> None:
    for length in range(4, len(FILE)):
        with pytest.raises(UserError, match="ends within its header"):
            read_metadata(io.BytesIO(FILE[:length]))


def test_other_files_are_refused() -> None:
    with pytest.raises(UserError, match=r"begins with b'PK"):
        read_metadata(io.BytesIO(b"PK\x03\x04"))
    with pytest.raises(UserError, match="version 1"):
        read_metadata(io.BytesIO(_file(version=1)))
    with pytest.raises(UserError, match="unknown type 13"):
        read_metadata(io.BytesIO(_file(_string("x") + struct.pack("<I", 13))))
