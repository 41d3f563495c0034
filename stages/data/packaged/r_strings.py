r"""Character vectors out of an R package's lazy-load file, without R.

A `.rdb` file is a row of objects, each its size (4 bytes, big-endian) before a zlib stream. The
stream is R's XDR serialisation (*R Internals*, section 1.8): `X\n`, a version with an encoding,
then the object. A character vector (STRSXP) is its flags, its length and as many CHARSXPs, each its
flags, its length in bytes and the bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from teacher_cache.cache.errors import UserError

_STRSXP, _CHARSXP = 16, 9
_NA_LENGTH = -1


def read_string_vectors(path: Path) -> list[list[str]]:
    """Every object of a `.rdb` file, in order; all must be character vectors.

    Missing strings (`NA`) come as empty ones.

    Raises:
        UserError: if the file is damaged or holds something else.
    """
    data = path.read_bytes()
    vectors: list[list[str]] = []
    start = 0
    try:
        while start < len(data):
            (num_bytes,) = struct.unpack_from(">I", data, start)
            stream = zlib.decompressobj()
            content = stream.decompress(data[start + 4 :])
            if len(content) != num_bytes or not stream.eof:
                raise ValueError(f"an object has {len(content)} bytes, expected {num_bytes}")
            vectors.append(parse_string_vector(content))
            start = len(data) - len(stream.unused_data)
    except (struct.error, zlib.error, ValueError) as error:
        raise UserError(
            f"{path.name} cannot be read as R's character vectors ({error}): fetch its package "
            "again"
        ) from error
    return vectors


def parse_string_vector(content: bytes) -> list[str]:
    """One character vector in R's XDR serialisation, version 2 or 3.

    Raises:
        ValueError: if it is something else, or cut short.
    """
    if content[:2] != b"X\n":
        raise ValueError("it does not begin with `X` and a newline")
    (version,) = struct.unpack_from(">i", content, 2)
    place = 14  # the version, the writer's and the oldest reader's
    if version == 3:
        (encoding_bytes,) = struct.unpack_from(">i", content, place)
        place += 4 + encoding_bytes
    flags, length = struct.unpack_from(">Ii", content, place)
    if flags & 0xFF != _STRSXP:
        raise ValueError(f"an object is of R's type {flags & 0xFF}, expected {_STRSXP}")
    place += 8
    strings: list[str] = []
    for _ in range(length):
        flags, num_bytes = struct.unpack_from(">Ii", content, place)
        if flags & 0xFF != _CHARSXP:
            raise ValueError(f"a string is of R's type {flags & 0xFF}, expected {_CHARSXP}")
        place += 8
        num_bytes = 0 if num_bytes == _NA_LENGTH else num_bytes
        if place + num_bytes > len(content):
            raise ValueError("a string is cut short")
        strings.append(content[place : place + num_bytes].decode("utf-8"))
        place += num_bytes
    return strings


def write_text_files(rdb: Path, names: Sequence[str]) -> None:
    """Replace a `.rdb` file by text files beside it, one an object, a line an element.

    Raises:
        UserError: if it is damaged or holds another number of objects.
    """
    vectors = read_string_vectors(rdb)
    if len(vectors) != len(names):
        raise UserError(f"{rdb.name} holds {len(vectors)} objects, expected {len(names)}")
    for name, lines in zip(names, vectors, strict=True):
        text = "".join(f"{line}\n" for line in lines)
        (rdb.parent / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    rdb.unlink()
