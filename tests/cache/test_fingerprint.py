from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import (
    differences,
    file_sha256,
    fingerprint,
    refuse_changed_settings,
)

RECORDED = {"task": "classification", "teacher": {"dtype": "float32", "commit": None}}


def _with(**teacher: Any) -> dict[str, Any]:
    return {**RECORDED, "teacher": {**RECORDED["teacher"], **teacher}}


def test_is_the_hash_of_canonical_json() -> None:
    text = b'{"task":"classification","teacher":{"commit":null,"dtype":"float32"}}'
    assert fingerprint(RECORDED) == hashlib.sha256(text).hexdigest()


def test_order_does_not_count_and_every_value_does() -> None:
    turned = {"teacher": {"commit": None, "dtype": "float32"}, "task": "classification"}
    assert fingerprint(turned) == fingerprint(RECORDED)
    others = [{}, _with(dtype="float16"), _with(commit=""), _with(more=0), {**RECORDED, "task": 1}]
    assert len({fingerprint(one) for one in [RECORDED, *others]}) == 6


def test_hashes_files_of_any_size(tmp_path: Path) -> None:
    for size in (0, 1, 3_000_000):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x" * size).hexdigest()


def test_differences_are_leaves_by_their_dotted_names() -> None:
    assert list(differences(RECORDED, RECORDED)) == []
    assert list(differences(RECORDED, {**_with(dtype="float16", new=[1]), "task": "lm"})) == [
        ("task", "classification", "lm"),
        ("teacher.dtype", "float32", "float16"),
        ("teacher.new", None, [1]),
    ]
    assert list(differences({"a": {"b": 1}}, {"a": 2})) == [("a", {"b": 1}, 2)]


def test_refusal_names_each_field_both_values_and_the_remedy(tmp_path: Path) -> None:
    refuse_changed_settings(tmp_path, RECORDED, _with(), start_again="--overwrite")
    changed = {**_with(dtype="float16"), "task": "lm"}
    with pytest.raises(UserError) as caught:
        refuse_changed_settings(tmp_path, RECORDED, changed, start_again="--overwrite")
    assert str(caught.value) == (
        f"{tmp_path} was made with other settings: task is 'classification' there and 'lm' in "
        "this command; teacher.dtype is 'float32' there and 'float16' in this command. Give the "
        "recorded values, another --out, or --overwrite to start again"
    )
