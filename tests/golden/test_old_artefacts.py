"""What an earlier release made still opens and holds the same values: the quick part of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.commands import CACHES, RUNS
from tests.golden.make import VALUES, unpack
from tests.golden.measure import cache_values, run_values

GOLDEN = json.loads(VALUES.read_text())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    unpack(folder)
    return folder


@pytest.mark.parametrize("name", CACHES)
def test_an_old_cache_opens(unpacked: Path, name: str) -> None:
    assert cache_values(unpacked / "caches" / name) == GOLDEN["caches"][name]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_opens(unpacked: Path, name: str) -> None:
    assert run_values(unpacked / "runs" / name) == GOLDEN["runs"][name]
