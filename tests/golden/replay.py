"""Do again, in one process, all that the golden tests look at: `python -m tests.golden.replay`.

FOLDER/anew/            everything made anew
FOLDER/anew.json        its values
FOLDER/old/             the committed artefacts, and what was done to them
FOLDER/old.json         by artefact: what each command said, and the hashes of files after it
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import chdir
from pathlib import Path
from shutil import rmtree
from typing import Any

from tests.command_line import pipe
from tests.golden.commands import (
    CACHES,
    CONVERSIONS,
    EVALUATIONS,
    HALVES,
    OTHER_RUNS,
    RUNS,
    STOPPED_AT,
    TEACHERS,
    UNNAMED,
    evaluation,
    resumed,
)
from tests.golden.make import unpack
from tests.golden.measure import cache_values, figures, file_hashes, run_values
from tests.golden.sources import write_sources

Json = dict[str, Any]

_ALL_CACHES = CACHES | CONVERSIONS
_ALL_RUNS = RUNS | OTHER_RUNS


def said(command: tuple[str, ...]) -> Json:
    """What a command said; an exception is a failure of this command alone."""
    try:
        outcome = pipe(*command)
    except Exception:
        return {"code": "exception", "stdout": "", "stderr": traceback.format_exc()}
    return {"code": outcome.code, "stdout": outcome.stdout, "stderr": outcome.stderr}


def replay_anew() -> Json:
    """Make everything; of each cache and run its values or, if its command fails, why."""
    caches = {name: _made(command, "caches", name) for name, command in _ALL_CACHES.items()}
    runs = {name: _made(command, "runs", name) for name, command in _ALL_RUNS.items()}
    return {"caches": caches, "runs": runs}


def _made(command: tuple[str, ...], kind: str, name: str) -> Json:
    outcome = said(command)
    if outcome["code"] != 0:
        return {"failed": outcome["stdout"] + outcome["stderr"]}
    return (cache_values if kind == "caches" else run_values)(Path(kind) / name)


def replay_cache(name: str) -> Json:
    """Look at an old cache, check it, make it again, and again without one of its shards."""
    cache = Path("caches") / name
    found: Json = {"before": file_hashes(cache), "values": cache_values(cache)}
    found["inspect"] = said(("inspect", str(cache), "--json"))
    found["verify"] = said(("verify", str(cache)))
    found["deep"] = said(("verify", str(cache), "--deep", "3", "--teacher", TEACHERS[name]))
    found["again"] = said(CACHES[name])
    found["after"] = file_hashes(cache)
    found["removed"] = _remove_a_shard(cache)
    found["rebuild"] = said(CACHES[name])
    found["rebuilt"] = file_hashes(cache)
    found["verify_rebuilt"] = said(("verify", str(cache)))
    return found


def replay_run(name: str) -> Json:
    """Train an old run again, which has nothing to do; evaluate it; finish its other half."""
    run = Path("runs") / name
    found: Json = {"before": file_hashes(run), "values": run_values(run)}
    found["again"] = said(RUNS[name])
    found["after"] = file_hashes(run)
    found["evaluate"] = said(evaluation(name, f"{name}.json"))
    if Path(f"{name}.json").exists():
        found["figures"] = figures(Path(f"{name}.json"))
    if name in HALVES:
        found |= replay_half(name)
    return found


def replay_half(name: str) -> Json:
    """Go on with a half-done run; its log before and after, clock and all."""
    half = Path("runs") / HALVES[name]
    state = half / f"checkpoints/checkpoint-{STOPPED_AT}/trainer_state.json"
    found: Json = {"history": json.loads(state.read_text())["log_history"]}
    found["resume"] = said(resumed(name))
    if found["resume"]["code"] == 0:
        found["resumed"] = run_values(half)
        found["log"] = json.loads((half / "run.json").read_text())["result"]["log"]
    return found


def replay_unnamed(kind: str) -> Json:
    """Run a command without `--out`; which folder it made."""
    before = set(Path(kind).iterdir())
    found = said(UNNAMED[kind])
    return found | {"made": sorted(path.name for path in set(Path(kind).iterdir()) - before)}


def _remove_a_shard(cache: Path) -> str:
    sidecar = json.loads(sorted(cache.glob("labeled/*/*.json"))[-1].read_text())
    shard = cache / sidecar["path"]
    if shard.is_dir():
        rmtree(shard)
    else:
        shard.unlink()
    return sidecar["path"]


def main(folder: Path) -> None:
    """Everything, into this folder."""
    anew, old = folder / "anew", folder / "old"
    write_sources(anew)
    with chdir(anew):
        made = replay_anew()
    (folder / "anew.json").write_text(json.dumps(made))
    write_sources(old)
    unpack(old)
    with chdir(old):
        # Runs first: they read the caches as they were committed.
        runs = {name: replay_run(name) for name in EVALUATIONS}
        caches = {name: replay_cache(name) for name in CACHES}
        unnamed = {kind: replay_unnamed(kind) for kind in UNNAMED}
    found = {"runs": runs, "caches": caches, "unnamed": unnamed}
    (folder / "old.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
