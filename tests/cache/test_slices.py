"""Several runs share one cache: its bytes are those of one run, whoever comes and goes when."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.lock import turn, writer_lock
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.plan import Share
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.cache.writer import CacheWriter
from tests.small_caches import (
    SETTINGS,
    commit_shard,
    contents,
    default_store,
    make_manifest,
    make_plans,
    set_shards_per_folder,
    shard_file,
    write_cache,
    write_teacher_files,
)

pytestmark = pytest.mark.usefixtures("store")

SIZES = (22, 6)  # 6 and 2 shards
HOLD = """
import sys
from pathlib import Path
from tests.cache.test_slices import default_store, started
default_store["name"] = sys.argv[3]
with started(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def started(cache: Path, share: str, sizes: tuple[int, int] = SIZES) -> ExitStack:
    """A slice that has begun, and goes on as long as the stack is open."""
    plans = make_plans(*sizes)
    with ExitStack() as stack:
        to = CacheWriter(
            cache, make_manifest(plans), plans, overwrite=False, share=Share.parse(share)
        )
        stack.enter_context(to)
        to.begin(write_teacher_files)
        return stack.pop_all()
    raise AssertionError


def make_slice(
    cache: Path, share: Share, *, sizes: tuple[int, int] = SIZES, most: int | None = None
) -> int:
    """Run a slice, of which a kill may leave no more than `most` shards; how many it made."""
    plans = make_plans(*sizes)
    manifest = make_manifest(plans)
    with CacheWriter(cache, manifest, plans, overwrite=False, share=share) as to:
        todo = to.begin(write_teacher_files)
        for split, shard_idx in todo[:most]:
            commit_shard(to, plans, split, shard_idx)
        if most is None and not to.manifest.complete:
            to.finish()
    return len(todo[:most])


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What one run writes."""
    write_cache(tmp_path / "whole", *SIZES)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("num", [1, 2, 3, 7, 8, 9, 20])
def test_slices_hold_every_shard_once(num: int) -> None:
    plans = make_plans(*SIZES)
    shares = [Share(idx=idx, num=num).of(plans) for idx in range(num)]
    assert sorted(shard for share in shares for shard in share) == Share().of(plans)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["", "1", "2/2", "1/0", "0/0", "-1/2", "a/b", "1/2/3", "0.5/2"])
def test_what_is_no_slice(text: str) -> None:
    with pytest.raises(UserError, match="is no slice: give i/n, where i is from 0 to n - 1"):
        Share.parse(text)


@pytest.mark.parametrize("shards_per_folder", [2, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_in_any_order_and_killed_anywhere_the_cache_is_that_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_per_folder: int, seed: int
) -> None:
    set_shards_per_folder(monkeypatch.setattr, shards_per_folder)
    write_cache(tmp_path / "whole", *SIZES)
    rng, cache = random.Random(seed), tmp_path / "cache"
    num = rng.randint(2, 9)
    made, order = 0, list(range(num))
    rng.shuffle(order)
    for idx in order:
        share = Share(idx=idx, num=num)
        for _ in range(rng.randint(0, 2)):
            made += make_slice(cache, share, most=rng.randint(0, 2))
        made += make_slice(cache, share)
        assert read_manifest(cache).complete == (idx == order[-1])
    assert made == len(Share().of(make_plans(*SIZES)))  # none twice
    assert contents(cache) == contents(tmp_path / "whole")
    assert verify(cache).problems == ()
    assert make_slice(cache, Share(idx=0, num=num)) == 0


def test_two_at_once_and_none_waits_for_the_other(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cache = tmp_path / "cache"
    plans = make_plans(*SIZES)
    with ExitStack() as stack:
        slices = []
        for idx in range(3):
            share = Share(idx=idx, num=3)
            manifest = make_manifest(plans)
            to = stack.enter_context(
                CacheWriter(cache, manifest, plans, overwrite=False, share=share)
            )
            slices.append((to, to.begin(write_teacher_files)))
        for step in range(3):  # in turn, a shard each
            for to, todo in slices:
                for split, shard_idx in todo[step : step + 1]:
                    commit_shard(to, plans, split, shard_idx)
        assert [to.finish().complete for to, _ in slices] == [True, True, True]
    assert contents(cache) == whole


def test_whoever_opens_an_unfinished_cache_is_told_which_slices_are_missing(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    make_slice(cache, Share(idx=1, num=4))
    make_slice(cache, Share(idx=2, num=4), most=1)
    words = (
        f"{cache} is not complete: run the same `pipe cache-teacher` again with --slice 0/4, 2/4, "
        "3/4: these are missing, 5 of 8 shards (without --slice one run makes them all)"
    )
    with pytest.raises(UserError) as caught:
        CacheReader(cache)
    assert str(caught.value) == words
    assert verify(cache).problems == (words,)
    make_slice(cache, Share(idx=0, num=4))
    make_slice(cache, Share(idx=2, num=4))
    with pytest.raises(UserError, match="with --slice 3/4: this slice is missing, 2 of 8 shards"):
        CacheReader(cache)
    make_slice(cache, Share(idx=3, num=4), most=2)  # killed before it finished the cache
    with pytest.raises(UserError, match="every shard is there, and it finishes the cache"):
        CacheReader(cache)
    assert make_slice(cache, Share(idx=0, num=4)) == 0
    assert len(CacheReader(cache)) == 17


@pytest.mark.parametrize("num", [1, 3])
def test_slices_go_on_where_others_of_another_number_stopped(
    tmp_path: Path, whole: dict[str, bytes], num: int
) -> None:
    cache = tmp_path / "cache"
    make_slice(cache, Share(idx=0, num=4))
    made = sum(make_slice(cache, Share(idx=idx, num=num)) for idx in range(num))
    assert made == 8 - 2
    assert contents(cache) == whole


def test_a_damaged_shard_is_made_again_by_its_slice(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    cache = tmp_path / "cache"
    make_slice(cache, Share(idx=0, num=2))
    damaged = shard_file(cache, "labeled", 2)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert make_slice(cache, Share(idx=1, num=2), most=0) == 0  # is not its to look at
    assert make_slice(cache, Share(idx=0, num=2), most=0) == 0  # killed before it made it anew
    assert make_slice(cache, Share(idx=1, num=2)) == 4
    assert not read_manifest(cache).complete
    assert make_slice(cache, Share(idx=0, num=2)) == 1
    assert contents(cache) == whole


def test_a_grown_cache_in_slices(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cache = tmp_path / "cache"
    assert make_slice(cache, Share(), sizes=(10, 6)) == 5
    assert make_slice(cache, Share(idx=0, num=2)) == 2
    assert make_slice(cache, Share(idx=1, num=2)) == 2
    assert contents(cache) == whole


def test_starting_again_is_not_for_a_slice(tmp_path: Path) -> None:
    plans = make_plans(*SIZES)
    with pytest.raises(UserError, match="--overwrite would remove what other slices made"):
        CacheWriter(
            tmp_path, make_manifest(plans), plans, overwrite=True, share=Share(idx=0, num=2)
        )


def test_other_settings_are_refused_while_a_slice_runs(tmp_path: Path) -> None:
    plans = make_plans(*SIZES)
    other = make_manifest(plans, SETTINGS | {"max_length": 9})
    with started(tmp_path / "cache", "0/2"):
        share = Share(idx=1, num=2)
        with (
            pytest.raises(UserError, match="max_length is 8 there and 9 in this command"),
            CacheWriter(tmp_path / "cache", other, plans, overwrite=False, share=share),
        ):
            pass
        with pytest.raises(UserError, match="in slices of fewer documents than this run asks"):
            started(tmp_path / "cache", "1/2", (26, 6))


class Holder:
    """A process that holds a slice until it is killed."""

    def __init__(self, cache: Path, share: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(cache), share, default_store["name"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def test_who_may_write_beside_a_slice(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with Holder(cache, "0/2") as holder:
        pid = holder.process.pid
        with pytest.raises(UserError, match=rf'slice 0/2: .*"pid": {pid}.*give another --out'):
            make_slice(cache, Share(idx=0, num=2))
        with pytest.raises(UserError, match=rf'written in 2 slices .*"pid": {pid}.*a slice of 2'):
            make_slice(cache, Share(idx=0, num=3))
        with pytest.raises(UserError, match=rf'slice 0/2: .*"pid": {pid}'):
            write_cache(cache, *SIZES)
        left = cache / ".manifest.json.0123abcd.tmp"
        left.write_bytes(b"half")
        assert make_slice(cache, Share(idx=1, num=2)) == 4
        assert left.exists(), "another process may be writing it"
    assert (cache / "slice-0-of-2.lock").exists()  # the kill left it, and it locks nothing
    assert make_slice(cache, Share(idx=0, num=2)) == 4
    assert read_manifest(cache).complete and not left.exists()


def test_a_slice_waits_for_its_turn_and_not_for_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_cache.cache.lock._PATIENCE_S", 0.2)
    cache = tmp_path / "cache"
    with turn(cache, Share(idx=0, num=2)):
        waiting = threading.Thread(target=make_slice, args=(cache, Share(idx=1, num=2)))
        waiting.start()
        time.sleep(0.5)  # longer than it is patient with others
        assert waiting.is_alive() and not (cache / "manifest.json").exists()
    waiting.join(timeout=30)
    assert (cache / "manifest.json").exists()
    with writer_lock(cache), pytest.raises(UserError, match=f'"pid": {os.getpid()}'):
        make_slice(cache, Share(idx=0, num=2))
