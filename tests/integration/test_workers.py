"""Stage one by torchrun's ranks and on Ray, workers killed at random: the bytes of one process."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.verify import verify
from tests.small_caches import contents

BIN = Path(sys.executable).parent
LIMIT_S = 600  # of a command, on a machine that does much else
NUM_KILLS = 3
TORCHRUN = (str(BIN / "torchrun"), "--nproc-per-node", "2", "--no-python")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "240"}

Command = tuple[str, ...]


@pytest.fixture(params=["classification-arrow", "classification-zarr", "lm-arrow", "lm-zarr"])
def command(
    request: pytest.FixtureRequest, acl_imdb: Path, tiny_bert: Path, small_language_model: Path
) -> Command:
    """`pipe cache-teacher` of 60 or 90 shards, without `--out`; a teacher has one thread."""
    task, store = request.param.split("-")
    kind = {
        "classification": ("--teacher", str(tiny_bert), "--views", "1", "--shard-documents", "4"),
        "lm": (
            *("--task", "lm", "--teacher", str(small_language_model), "--top-k", "8"),
            *("--shard-documents", "2"),
        ),
    }[task]
    return (
        *(str(BIN / "pipe"), "cache-teacher", "--data", str(acl_imdb), *kind),
        *("--format", store, "--max-length", "48", "--device", "cpu"),
        *("--threads", "1"),
    )


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A command that ends with the body."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def said(*command: str) -> str:
    """What a command that succeeds says."""
    with started(*command) as process:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
    return output


def processes(is_wanted: Callable[[str, str], bool]) -> list[int]:
    """Ids of processes by their command line and environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (folder / "environ").read_bytes().replace(b"\0", b"\n").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if is_wanted(line, f"\n{environment}"):
            found.append(int(folder.name))
    return found


def process_of_rank(cache: Path, rank: int) -> int:
    """The process of a rank that works on a cache."""
    (pid,) = processes(
        lambda line, environment: f"--out {cache}" in line and f"\nRANK={rank}\n" in environment
    )
    return pid


def num_committed(cache: Path) -> int:
    """Sidecars that are there."""
    return len(list(cache.glob("*/000/*.json")))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_shards(cache: Path, num: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many are committed, by a process that goes on."""

    def are_there() -> bool:
        assert process.poll() is None
        return num_committed(cache) >= num

    wait_for(are_there)


@pytest.mark.slow
def test_ranks_killed_at_random_make_the_cache_of_one_process(
    command: Command, tmp_path: Path
) -> None:
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    said(*command, "--out", str(whole))
    num_shards = num_committed(whole)
    assert num_shards > 40
    rng, before = random.Random(str(command)), 0
    for number in range(NUM_KILLS):
        rank = (number + 1) % 2  # the main one too
        with started(*TORCHRUN, *command, "--out", str(cache)) as process:
            enough = before + rng.randint(1, num_shards // NUM_KILLS - 5)
            wait_for_shards(cache, enough, process)
            pid = process_of_rank(cache, rank)
            os.kill(pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        # torchrun names the rank that died.
        assert re.search(rf"rank +: {rank} .*\n.*exitcode +: -9 \(pid: {pid}\)", output), output
        assert not read_manifest(cache).complete
        kept, before = before, num_committed(cache)
        assert before > kept
    output = said(*TORCHRUN, *command, "--out", str(cache))
    assert f"{num_shards - before} shards computed, {before} kept" in output
    assert output.count("is complete") == 1
    assert contents(cache) == contents(whole)
    assert verify(cache).problems == ()
    assert f"0 shards computed, {num_shards} kept" in said(*TORCHRUN, *command, "--out", str(cache))


@pytest.mark.slow
def test_ranks_say_once_what_is_wrong(acl_imdb: Path, tiny_bert: Path, tmp_path: Path) -> None:
    command = ("cache-teacher", "--data", str(acl_imdb), "--out", str(tmp_path / "cache"))
    for more, sentence in (
        (("--teacher", str(tmp_path / "none")), "none"),
        (("--teacher", str(tiny_bert), "--slice", "0/2"), "torchrun and --slice 0/2 each say who"),
    ):
        with started(*TORCHRUN, str(BIN / "pipe"), *command, *more) as process:
            output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        assert output.count("error: ") == 1 and sentence in output, output
        assert "Traceback" not in output.partition("ChildFailedError")[0].partition("\nW")[0]


def on_ray(*more: str) -> Command:
    """Options of two workers on Ray, on this machine."""
    return ("--executor", "ray", "--num-workers", "2", *more)


def ray_workers(folder: Path) -> list[int]:
    """Ids of the processes that hold a teacher for a run whose output goes to `folder`."""
    return processes(
        lambda line, environment: (
            line.startswith("ray::RemoteWorker") and f"TEST_RUN={folder}" in environment
        )
    )


def kill_at_random(folder: Path, num: int, cache: Path, killed: list[int]) -> None:
    """Kill `num` workers, one after another, each once shards have been made since the last."""
    rng = random.Random(num)
    for _ in range(num):
        victim = worker_after(folder, cache, num_committed(cache) + rng.randint(2, 8), rng)
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)


def worker_after(folder: Path, cache: Path, num: int, rng: random.Random) -> int:
    """One of the workers that live, once so many shards are there."""
    wait_for(lambda: num_committed(cache) >= num and bool(ray_workers(folder)))
    return rng.choice(ray_workers(folder))


@pytest.mark.slow
def test_workers_on_ray_killed_at_random_make_the_cache_of_one_process(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    said(*command, "--out", str(whole))
    num_shards = num_committed(whole)
    monkeypatch.setitem(ENVIRONMENT, "TEST_RUN", str(tmp_path))
    killed: list[int] = []
    killer = threading.Thread(
        target=kill_at_random, args=(tmp_path, NUM_KILLS, cache, killed), daemon=True
    )
    killer.start()
    output = said(*command, "--out", str(cache), *on_ray())
    killer.join()
    assert len(set(killed)) == NUM_KILLS
    assert f"{num_shards} shards computed, 0 kept" in output
    assert "Traceback" not in output
    assert contents(cache) == contents(whole)
    assert verify(cache).problems == ()
    assert not processes(lambda _, environment: f"TEST_RUN={tmp_path}" in environment)
    assert f"0 shards computed, {num_shards} kept" in said(*command, "--out", str(cache), *on_ray())
