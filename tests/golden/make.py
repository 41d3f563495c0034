"""Make every golden artefact anew: `python -m tests.golden.make FOLDER`.

It writes the sources, the caches and the runs into an empty folder. `--record` besides replaces
what is committed: the artefacts and `values.json`. Do that only for a change that is meant to
change what users have on disk, and say so in the changelog; a restructuring never is one.
The folder's path stands in what is recorded, so take one that says nothing of you, in `/tmp` say.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import tarfile
from contextlib import chdir
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from typing import Any

from tests.golden.commands import (
    CACHES,
    CONVERSIONS,
    EVALUATIONS,
    HALVES,
    OTHER_RUNS,
    RUNS,
    STOPPED_AT,
    evaluation,
)
from tests.golden.environment import ENVIRONMENT, float_functions, installed
from tests.golden.measure import cache_values, figures, run_values
from tests.golden.sources import write_sources

HERE = Path(__file__).parent
VALUES = HERE / "values.json"
ARTEFACTS = HERE / "artefacts"
_CHECKPOINTS = "checkpoints"
_PACKED = ".tar.gz"


def make(folder: Path) -> None:
    """Make everything in a folder, evaluations included."""
    from tests.command_line import done

    write_sources(folder)
    with chdir(folder):
        for command in (CACHES | CONVERSIONS | RUNS | OTHER_RUNS).values():
            done(*command)
        for name in EVALUATIONS:
            done(*evaluation(name, f"{name}.json"))
        for name, half in HALVES.items():
            _stop(Path("runs") / name, Path("runs") / half)


def values(folder: Path) -> dict[str, Any]:
    """All that is written down of what was made."""
    return {
        "versions": installed(),
        "float_functions": float_functions(),
        "caches": {name: cache_values(folder / "caches" / name) for name in CACHES | CONVERSIONS},
        "runs": {
            name: _kept(name, run_values(folder / "runs" / name)) for name in RUNS | OTHER_RUNS
        },
        "figures": {name: figures(folder / f"{name}.json") for name in EVALUATIONS},
    }


def record(folder: Path) -> None:
    """Replace the committed artefacts and values by what was made."""
    rmtree(ARTEFACTS, ignore_errors=True)
    for name in CACHES:
        _pack(folder / "caches" / name, ARTEFACTS / "caches" / f"{name}{_PACKED}")
    for name in RUNS:
        _pack(folder / "runs" / name, ARTEFACTS / "runs" / f"{name}{_PACKED}", without=_CHECKPOINTS)
    for half in HALVES.values():
        _pack(folder / "runs" / half, ARTEFACTS / "runs" / f"{half}{_PACKED}")
    VALUES.write_text(_written_down(values(folder)) + "\n")


def unpack(folder: Path) -> None:
    """Write the committed artefacts as they lay in the folder that they were made in."""
    for packed in sorted(ARTEFACTS.rglob(f"*{_PACKED}")):
        name = packed.relative_to(ARTEFACTS).as_posix().removesuffix(_PACKED)
        with tarfile.open(packed) as archive:
            archive.extractall(folder / name, filter="data")


def _kept(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A run's values; of what no artefact is kept of, without settings, which have their hash."""
    left_out = () if name in RUNS else ("settings",)
    return {key: value for key, value in found.items() if key not in left_out}


def _written_down(value: Any, depth: int = 3) -> str:
    """JSON with a line for every value at this depth, so that a difference shows what differs."""
    if not depth or not isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    lines = [
        f"{json.dumps(key)}: {_written_down(one, depth - 1)}" for key, one in sorted(value.items())
    ]
    return "{\n" + ",\n".join(lines) + "\n}"


def _stop(finished: Path, half: Path) -> None:
    """A copy of a run as a kill behind an early checkpoint would have left it."""
    later = [
        one.name
        for one in (finished / _CHECKPOINTS).iterdir()
        if one.name != f"checkpoint-{STOPPED_AT}"
    ]
    results = [one.name for one in finished.iterdir() if one.is_file() and one.name != "run.json"]
    copytree(finished / _CHECKPOINTS, half / _CHECKPOINTS, ignore=ignore_patterns(*later))
    assert results, f"{finished} has no result"
    run = json.loads((finished / "run.json").read_text()) | {"complete": False, "result": None}
    text = json.dumps(run, sort_keys=True, indent=1, ensure_ascii=False)
    (half / "run.json").write_text(text + "\n")


def _pack(folder: Path, archive: Path, *, without: str | None = None) -> None:
    """Compress a folder; equal files give equal archives, which hold no owners and no dates."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as packed:
        for path in files:
            inside = path.relative_to(folder)
            if inside.parts[0] != without:
                entry = tarfile.TarInfo(inside.as_posix())
                entry.size = path.stat().st_size
                packed.addfile(entry, io.BytesIO(path.read_bytes()))
    archive.write_bytes(gzip.compress(plain.getvalue(), mtime=0))


def main() -> None:
    """The command; it starts itself anew where the environment is another one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="An empty folder, or one to be made.")
    parser.add_argument("--record", action="store_true", help="Replace what is committed, too.")
    given = parser.parse_args()
    if ENVIRONMENT.items() - os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | ENVIRONMENT)
    folder = given.folder.resolve()
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")  # not the user's own
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    if given.record:
        record(folder)


if __name__ == "__main__":
    main()
