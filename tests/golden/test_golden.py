"""Nothing that users have on disk may change: golden caches and runs, made anew and opened again.

`values.json` says what today's commands must make, and `artefacts/` holds what an earlier release
made, one compressed folder each. All commands run in one child process (`replay.py`), whose
environment (`environment.py` says what each setting is for) gives equal bits on any x86-64 machine
with the library versions that are written down beside the values. With other versions, what
depends on them is skipped, and the old artefacts must still open.

Here is only what a user sees: commands, files, the reader. If one of these tests fails after a
restructuring, the restructuring is wrong. `python -m tests.golden.make FOLDER --record` is for a
change that is meant to change what is on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.commands import CACHES, CONVERSIONS, HALVES, OTHER_RUNS, RUNS
from tests.golden.environment import (
    BITS_DEPEND_ON,
    SETTINGS_DEPEND_ON,
    differing,
    foreign_machine,
    run_module,
)
from tests.golden.make import ARTEFACTS, VALUES
from tests.golden.measure import stable_manifest
from tests.ready_made import ReadyMade

pytestmark = pytest.mark.timeout(900)  # the first test waits for all commands

GOLDEN: dict[str, Any] = json.loads(VALUES.read_text())
MAX_BYTES = 300_000

Json = dict[str, Any]

_other_settings = differing(GOLDEN["versions"], SETTINGS_DEPEND_ON)
_other_bits = ", ".join(
    found
    for found in (
        differing(GOLDEN["versions"], BITS_DEPEND_ON),
        foreign_machine(GOLDEN["float_functions"]),
    )
    if found
)
same_settings = pytest.mark.skipif(
    bool(_other_settings), reason=f"fingerprints were made by others: {_other_settings}"
)
same_bits = pytest.mark.skipif(bool(_other_bits), reason=f"bits were made by others: {_other_bits}")
each_cache = pytest.mark.parametrize("name", CACHES)
each_run = pytest.mark.parametrize("name", RUNS)
every_cache = pytest.mark.parametrize("name", CACHES | CONVERSIONS)
every_run = pytest.mark.parametrize("name", RUNS | OTHER_RUNS)


@pytest.fixture(scope="module")
def replayed(ready_made: ReadyMade) -> Path:
    """The folder in which everything was done again."""

    def make(folder: Path) -> None:
        folder.mkdir()
        child = run_module("tests.golden.replay", folder)
        assert child.returncode == 0, child.stdout + child.stderr

    return ready_made.folder("golden", make)


@pytest.fixture(scope="module")
def anew(replayed: Path) -> Json:
    """The values of everything made anew, by kind and name, or why it failed."""
    return json.loads((replayed / "anew.json").read_text())


@pytest.fixture(scope="module")
def old(replayed: Path) -> Json:
    """What became of the committed artefacts, by kind and name."""
    return json.loads((replayed / "old.json").read_text())


def made(anew: Json, kind: str, name: str) -> Json:
    """The values of a cache or run that must have been made."""
    assert "failed" not in anew[kind][name], anew[kind][name]["failed"]
    return anew[kind][name]


def succeeded(said: Json) -> str:
    """What a command printed that must succeed."""
    assert said["code"] == 0, said["stdout"] + said["stderr"]
    return said["stdout"]


@same_settings
@every_cache
def test_a_cache_has_its_fingerprint_and_settings(anew: Json, name: str) -> None:
    found = made(anew, "caches", name)["manifest"]
    golden = GOLDEN["caches"][name]["manifest"]
    assert found["settings"] == golden["settings"]
    assert found["fingerprint"] == golden["fingerprint"]


@same_bits
@every_cache
def test_a_cache_has_its_bits(anew: Json, name: str) -> None:
    assert made(anew, "caches", name) == GOLDEN["caches"][name]


@same_settings
@every_run
def test_a_run_has_its_settings(anew: Json, name: str) -> None:
    found, golden = made(anew, "runs", name), GOLDEN["runs"][name]
    if "settings" in golden:
        assert found["settings"] == golden["settings"]
    assert found["settings_sha256"] == golden["settings_sha256"]


@same_bits
@every_run
def test_a_run_has_its_weights(anew: Json, name: str) -> None:
    found, golden = made(anew, "runs", name), GOLDEN["runs"][name]
    assert {key: found[key] for key in golden} == golden


@each_cache
def test_an_old_cache_is_read(old: Json, name: str) -> None:
    assert old["caches"][name]["values"] == GOLDEN["caches"][name]


@each_cache
def test_an_old_cache_is_shown(old: Json, name: str) -> None:
    shown = json.loads(succeeded(old["caches"][name]["inspect"]))
    shown.pop("measured", None)  # of complete ones; earlier releases printed the manifest alone
    assert stable_manifest(shown) == GOLDEN["caches"][name]["manifest"]


@each_cache
def test_an_old_cache_is_sound(old: Json, name: str) -> None:
    assert "is sound" in succeeded(old["caches"][name]["verify"])


@same_settings
@each_cache
def test_an_old_caches_teacher_still_says_so(old: Json, name: str) -> None:
    assert "as cached" in succeeded(old["caches"][name]["deep"])


@same_settings
@each_cache
def test_an_old_cache_is_complete_to_stage_one(old: Json, name: str) -> None:
    found = old["caches"][name]
    num_shards = len(GOLDEN["caches"][name]["shards"])
    assert f"(0 shards computed, {num_shards} kept)" in succeeded(found["again"])
    assert found["after"] == found["before"]


@same_settings
@each_cache
def test_a_lost_shard_of_an_old_cache_is_rebuilt(old: Json, name: str) -> None:
    found = old["caches"][name]
    num_shards = len(GOLDEN["caches"][name]["shards"])
    assert f"(1 shards computed, {num_shards - 1} kept)" in succeeded(found["rebuild"])
    assert "is sound" in succeeded(found["verify_rebuilt"])


@same_bits
@each_cache
def test_a_rebuilt_shard_has_its_bits(old: Json, name: str) -> None:
    found = old["caches"][name]
    assert any(path.startswith(found["removed"]) for path in found["before"])
    assert _beside_the_manifest(found["rebuilt"]) == _beside_the_manifest(found["before"])


@each_run
def test_an_old_run_is_read(old: Json, name: str) -> None:
    assert old["runs"][name]["values"] == GOLDEN["runs"][name]


@same_settings
@each_run
def test_an_old_run_is_complete_to_stage_two(old: Json, name: str) -> None:
    found = old["runs"][name]
    assert "was trained before" in succeeded(found["again"])
    assert found["after"] == found["before"]


@same_settings
@each_run
def test_an_old_run_has_its_figures(old: Json, name: str) -> None:
    found = old["runs"][name]
    succeeded(found["evaluate"])
    golden = GOLDEN["figures"][name]
    assert found["figures"]["num_documents"] == golden["num_documents"]
    assert found["figures"]["rows"].keys() == golden["rows"].keys()
    for row, figures in golden["rows"].items():
        assert found["figures"]["rows"][row] == pytest.approx(figures, rel=1e-4, abs=1e-4), row


@same_bits
@pytest.mark.parametrize("name", HALVES)
def test_a_half_done_run_ends_in_the_same_weights(old: Json, name: str) -> None:
    found = old["runs"][name]
    succeeded(found["resume"])
    # The clock in it tells a run that went on from one that began again.
    assert found["log"][: len(found["history"])] == found["history"]
    assert found["resumed"]["settings"] == GOLDEN["runs"][name]["settings"]
    assert found["resumed"]["weights_sha256"] == GOLDEN["runs"][name]["weights_sha256"]


@same_settings
def test_folders_that_no_one_names_are_found_again(old: Json) -> None:
    for found in old["unnamed"].values():
        succeeded(found)
    fingerprint = GOLDEN["caches"]["reviews-plain"]["manifest"]["fingerprint"]
    assert old["unnamed"]["caches"]["made"] == [f"reviews-{fingerprint[:8]}"]
    settings_sha256 = GOLDEN["runs"]["mamba1"]["settings_sha256"]
    assert old["unnamed"]["runs"]["made"] == [f"reviews-zarr-{settings_sha256[:8]}"]


def test_the_artefacts_are_small() -> None:
    sizes = [path.stat().st_size for path in ARTEFACTS.rglob("*") if path.is_file()]
    assert sum(sizes) < MAX_BYTES
    assert len(sizes) == len(CACHES) + len(RUNS) + len(HALVES)


def _beside_the_manifest(files: dict[str, str]) -> dict[str, str]:
    return {path: sha256 for path, sha256 in files.items() if path != "manifest.json"}
