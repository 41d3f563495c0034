"""One store of ready-made teachers, caches and runs a test run, shared by all of its workers.

What several tests only read is made once: by the first worker that asks, while the others wait.
Whoever wants to change a folder copies it first. Each worker looks at the end whether what it read
is still as it was made.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

MADE = ".json"  # beside a folder: what was in it when it was done


class ReadyMade:
    """Folders by name; each is made once and then only read.

    Args:
        root: of the store, the same for every worker of a test run.
    """

    def __init__(self, root: Path):
        self._root = root
        self._given: set[Path] = set()

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name, made if nobody has yet.

        Args:
            name: that says all that its contents depend on.
            make: fills the folder that it is given, which does not exist yet.
        """
        folder = self._root / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.with_name(folder.name + MADE)
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                make(folder)
                made.write_text(json.dumps(_contents(folder)))
        self._given.add(folder)
        return folder

    def changed(self) -> list[str]:
        """Files of the folders given here that are not as they were made."""
        return [
            f"{folder.relative_to(self._root)}/{name}"
            for folder in sorted(self._given)
            for name in _differing(_made(folder), _contents(folder))
        ]


def store_root(factory: pytest.TempPathFactory) -> Path:
    """Where this test run's store is: beside the workers' folders, or in the only process's own."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ready-made"


def _made(folder: Path) -> dict[str, list[int]]:
    return json.loads(folder.with_name(folder.name + MADE).read_text())


def _contents(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _differing(before: dict[str, list[int]], after: dict[str, list[int]]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
