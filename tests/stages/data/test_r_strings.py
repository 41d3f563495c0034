from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packaged.packages import (
    parse_string_vector,
    read_string_vectors,
    write_text_files,
)

STRINGS = ["It is a truth", "", "café", "\U0001f9e1 本"]


def serialised(strings: list[str | None], *, version: int = 3) -> bytes:
    """As R's `serialize(x, NULL, xdr = TRUE, version = version)` writes it."""
    content = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    if version == 3:
        content += struct.pack(">i", 5) + b"UTF-8"
    content += struct.pack(">Ii", 16, len(strings))
    for string in strings:
        data = (string or "").encode()
        content += struct.pack(">Ii", 0x40009, -1 if string is None else len(data)) + data
    return content


def rdb(*objects: bytes) -> bytes:
    """A lazy-load file of these objects."""
    return b"".join(struct.pack(">I", len(one)) + zlib.compress(one) for one in objects)


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"))), st.sampled_from([2, 3]))
def test_a_vector_comes_back(strings: list[str], version: int) -> None:
    assert parse_string_vector(serialised([*strings], version=version)) == strings


def test_missing_strings_are_empty() -> None:
    assert parse_string_vector(serialised(["a", None, "b"])) == ["a", "", "b"]


def test_objects_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.rdb"
    path.write_bytes(rdb(serialised([*STRINGS]), serialised([]), serialised(["x"])))
    assert read_string_vectors(path) == [STRINGS, [], ["x"]]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (rdb(serialised(["abc"]))[:-3], "expected"),
        (rdb(serialised(["abc"])[:-1]), "cut short"),
        (rdb(b"A\n" + serialised(["abc"])[2:]), "does not begin with"),
        (rdb(serialised([]).replace(b"\0\0\0\x10", b"\0\0\0\x0e")), "type 14, expected 16"),
        (rdb(serialised(["a"]).replace(b"\0\x04\0\x09", b"\0\x04\0\x08")), "type 8, expected 9"),
        (b"\0\0\0\x09nonsense", "incorrect header"),
        (b"\0\0", "4 bytes"),
        (struct.pack(">I", 3) + zlib.compress(serialised(["a"])), "expected 3"),
    ],
)
def test_damage_is_a_sentence(tmp_path: Path, damaged: bytes, message: str) -> None:
    path = tmp_path / "x.rdb"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"x\.rdb cannot be read .*{message}.*fetch its package"):
        read_string_vectors(path)


def test_text_files_replace_the_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.rdb"
    path.write_bytes(rdb(serialised([*STRINGS]), serialised(["x"])))
    with pytest.raises(UserError, match="holds 2 objects, expected 1"):
        write_text_files(path, ["a"])
    write_text_files(path, ["a", "b"])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    assert (tmp_path / "a.txt").read_bytes().decode() == "".join(f"{one}\n" for one in STRINGS)
