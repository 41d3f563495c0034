"""Read what a GGUF file says of its model: the header's keys and values, no tensors.

The format is llama.cpp's: magic, version, counts, then key, type and value, all little-endian.
"""

from __future__ import annotations

import struct
from typing import IO, Any

from teacher_cache.cache.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
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


def read_metadata(stream: IO[bytes]) -> dict[str, Any]:
    """The header's values by key; the stream is left where the tensors' descriptions begin.

    Args:
        stream: a GGUF file, at its beginning.

    Raises:
        UserError: if it is no GGUF file of version 2 or 3, or ends too early.
    """
    found = stream.read(4)
    if found != _MAGIC:
        raise UserError(f"the file begins with {found!r}, expected GGUF: give a GGUF model")
    version = _scalar(stream, "I")
    if version not in _VERSIONS:
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
