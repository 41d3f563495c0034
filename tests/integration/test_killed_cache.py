"""Kill stage one wherever it can be killed: the restarted cache is the one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from teacher_cache.cache.plan import is_split, viewed_split
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from tests.headed import write_headed_bert, write_labeled
from tests.integration.fork_server import ForkServer
from tests.integration.stage_one_child import HALF_WRITTEN, RENAMED, WRITTEN
from tests.small_caches import contents, set_shards_per_folder
from tests.tiny_models import write_tiny_bert
from tests.tiny_runs import language_config

SHARDS_PER_FOLDER = 2  # so that five shards fill two segments and begin a third
NUM_RANDOM_KILLS = 12

Shard = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class StageOne:
    """Stage one over a labelled and an unlabelled split, 3 + 2 shards.

    Attributes:
        server: forks it.
        config: without `out`.
        folder: for caches and logs.
        whole: contents of an uninterrupted cache.
        steps: of the uninterrupted run, in order.
        seconds: that it took.
    """

    server: ForkServer
    config: CacheTeacherConfig
    folder: Path
    whole: dict[str, bytes]
    steps: list[str]
    seconds: float


def _arguments(config: CacheTeacherConfig, cache: Path) -> dict[str, Any]:
    return {
        "config": config.model_copy(update={"out": cache}).model_dump_json(),
        "log": f"{cache}.log",
        "shards_per_folder": SHARDS_PER_FOLDER,
    }


def _lines(cache: Path, kind: str) -> list[str]:
    lines = Path(f"{cache}.log").read_text().splitlines()
    return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(f"{kind} ")]


def _shards(cache: Path, kind: str) -> set[Shard]:
    parts = [line.split() for line in _lines(cache, kind)]
    return {(split, int(shard_idx)) for split, shard_idx in parts}


def _durable(cache: Path) -> set[Shard]:
    """Shards whose sidecar has its name: from then on they are never computed again."""
    paths = [path for path in cache.glob("*/*/*.json") if is_split(path.parent.parent.name)]
    return {(path.parent.parent.name, int(path.stem)) for path in paths}


@pytest.fixture(scope="module")
def small_teacher(
    tmp_path_factory: pytest.TempPathFactory,
    bert_tokenizer: PreTrainedTokenizerBase,
    acl_imdb: Path,
) -> Path:
    """A tiny BERT with 300 ids: writing 30,522 of them anew in each run would take the time."""
    texts = [path.read_text() for path in sorted(acl_imdb.glob("train/*/*.txt"))]
    assert isinstance(bert_tokenizer, PreTrainedTokenizerFast)
    tokenizer = bert_tokenizer.train_new_from_iterator(texts, 300)
    return write_tiny_bert(tmp_path_factory.mktemp("small-teacher"), tokenizer)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    output = tmp_path_factory.mktemp("server") / "output.txt"
    with ForkServer("tests.integration.stage_one_child", output) as server:
        yield server


@pytest.fixture(scope="module")
def stage_one(
    tmp_path_factory: pytest.TempPathFactory,
    server: ForkServer,
    small_teacher: Path,
    acl_imdb: Path,
) -> StageOne:
    folder = tmp_path_factory.mktemp("caches")
    source = str(acl_imdb)
    config = CacheTeacherConfig.of(
        name="films",
        teacher=str(small_teacher),
        max_length=32,
        shard_documents=4,
        labeled=CorpusConfig(source=source, split="train", max_samples=10),
        unlabeled=CorpusConfig(source=source, split="unsupervised", labeled=False, max_samples=8),
    )
    warm = config.model_copy(update={"out": folder / "warm"})
    server.call("warm_up", config=warm.model_dump_json())
    return _uninterrupted(server, config, folder, num_shards=5)


@pytest.fixture(scope="module")
def language_stage_one(
    tmp_path_factory: pytest.TempPathFactory,
    server: ForkServer,
    small_language_model: Path,
    acl_imdb: Path,
) -> StageOne:
    """The same of a language model: packed samples, and what its codec keeps of each position."""
    folder = tmp_path_factory.mktemp("language-caches")
    config = language_config(None, small_language_model, acl_imdb, shard_documents=4)
    warm = config.model_copy(update={"out": folder / "warm"})
    server.call("warm_up", config=warm.model_dump_json())
    return _uninterrupted(server, config, folder, num_shards=5)


@pytest.fixture(scope="module")
def labels_stage_one(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer, small_teacher: Path
) -> StageOne:
    """The same of pairs with any of three labels, and of their views."""
    folder = tmp_path_factory.mktemp("labels-caches")
    head = "multi_label_classification"
    data = write_labeled(folder / "pairs.jsonl", head, num=10, second="claim")
    tokenizer = AutoTokenizer.from_pretrained(small_teacher)
    config = CacheTeacherConfig.of(
        name="labels",
        teacher=str(write_headed_bert(folder / "teacher", tokenizer, head)),
        max_length=32,
        shard_documents=4,
        labeled=CorpusConfig(source=str(data), text_column="text,claim", pairs=True),
        views=1,
    )
    warm = config.model_copy(update={"out": folder / "warm"})
    server.call("warm_up", config=warm.model_dump_json())
    return _uninterrupted(server, config, folder, num_shards=6)


@pytest.fixture(params=["stage_one", "language_stage_one", "labels_stage_one"])
def either_stage_one(request: pytest.FixtureRequest) -> StageOne:
    return request.getfixturevalue(request.param)


def _uninterrupted(
    server: ForkServer, config: CacheTeacherConfig, folder: Path, *, num_shards: int
) -> StageOne:
    cache = folder / "whole"
    started = time.monotonic()
    assert server.run("cache_teacher", **_arguments(config, cache)) == 0, server.output.read_text()
    seconds = time.monotonic() - started
    assert len(_shards(cache, "forward")) == num_shards
    with pytest.MonkeyPatch.context() as patch:
        set_shards_per_folder(patch.setattr, SHARDS_PER_FOLDER)
        assert verify(cache).problems == ()
    return StageOne(
        server=server,
        config=config,
        folder=folder,
        whole=contents(cache),
        steps=_lines(cache, "step"),
        seconds=seconds,
    )


def _run(stage_one: StageOne, cache: Path, **more: object) -> int:
    """Run until the end or a death; check that what was durable before was kept."""
    Path(f"{cache}.log").write_text("")
    before = _durable(cache)
    code = stage_one.server.run("cache_teacher", **_arguments(stage_one.config, cache), **more)
    _check_kept(cache, before)
    return code


def _check_kept(cache: Path, before: set[Shard]) -> None:
    computed = _shards(cache, "forward")
    assert not computed & before, f"computed again: {computed & before}"
    if computed:
        assert _shards(cache, "kept") == before


def _complete(stage_one: StageOne, cache: Path, killed: str) -> None:
    code = _run(stage_one, cache)
    assert code == 0, f"after a kill {killed}: {stage_one.server.output.read_text()[-2000:]}"
    _compare(stage_one, cache, killed)


def _compare(stage_one: StageOne, cache: Path, killed: str) -> None:
    found = contents(cache)
    different = [
        name
        for name in sorted(found.keys() | stage_one.whole.keys())
        if found.get(name) != stage_one.whole.get(name)
    ]
    assert not different, f"after a kill {killed}"
    shutil.rmtree(cache)


def _moments(steps: list[str]) -> list[str]:
    """Every step between two commits; the half of a file and the tokenizer's once a kind."""
    chosen: list[str] = []
    seen: Counter[str] = Counter()
    for step in steps:
        phase, path, _ = step.split()
        kind = f"{phase} {Path(path).parts[0]} {Path(path).suffix}"
        seen[kind] += 1
        if seen[kind] == 1 or not (phase == HALF_WRITTEN or path.startswith("teacher/")):
            chosen.append(step)
    return chosen


def test_killed_between_any_two_steps(either_stage_one: StageOne) -> None:
    stage_one = either_stage_one
    moments = _moments(stage_one.steps)
    # Shard, sidecar, segment and manifest of both splits, before and after they get their names.
    kinds = {(step.split()[0], step.split()[1].split("/")[0]) for step in moments}
    assert len(kinds) == 3 * len(("labeled", "unlabeled", "index", "manifest.json", "teacher"))
    assert len(moments) >= 40
    for idx, step in enumerate(moments):
        cache = stage_one.folder / f"step-{idx}"
        assert _run(stage_one, cache, die_at=step) == -signal.SIGKILL, step
        assert _lines(cache, "step")[-1] == step
        _complete(stage_one, cache, f"at: {step}")


def test_with_states_and_maps_killed_at_every_shard(stage_one: StageOne) -> None:
    cache = stage_one.folder / "pooled-whole"
    asked = {"hidden": "pooled,last,0", "attention": "mean", "attention_layers": "all"}
    pooled = replace(stage_one, config=stage_one.config.model_copy(update=asked))
    assert _run(pooled, cache) == 0, pooled.server.output.read_text()
    pooled = replace(pooled, whole=contents(cache))
    assert CacheReader(cache).column("pooled").shape == (10, 32)
    sample = CacheReader(cache).sample(0)
    assert len(sample["attention_1"]) == len(sample["input_ids"]) ** 2
    assert sample["hidden"].shape == sample["hidden_0"].shape == (len(sample["input_ids"]), 32)
    steps = [one for one in _moments(_lines(cache, "step")) if "labeled/" in one]
    shards = [one for one in steps if ".arrow" in one and one.startswith(HALF_WRITTEN)]
    committed = [one for one in steps if ".json" in one and not one.startswith(HALF_WRITTEN)]
    cache, num_killed = pooled.folder / "pooled", 0
    for step in [*shards, *committed]:
        if _run(pooled, cache, die_at=step) == 0:  # it had come past this step before
            _compare(pooled, cache, f"at: {step}")
            continue
        assert _lines(cache, "step")[-1] == step
        num_killed += 1
    assert num_killed >= 6
    _complete(pooled, cache, "at every shard")


def test_a_zarr_cache_killed_at_every_step_of_a_shard(stage_one: StageOne) -> None:
    """Each file half-written, the group before and after it has its name, its old one put away."""
    config = stage_one.config.model_copy(update={"format": "zarr"})
    folder = stage_one.folder / "zarr"
    folder.mkdir()
    zarr = _uninterrupted(stage_one.server, config, folder, num_shards=5)
    first = [one for one in zarr.steps if one.split()[1].startswith("labeled/000/000000.")]
    group = "labeled/000/000000.zarr"
    assert f"{HALF_WRITTEN} {group}/zarr.json 0" in first
    files = [one for one in first if one.startswith(f"{HALF_WRITTEN} {group}/")]
    assert len(files) == 5 + 1 + 5  # metadata of arrays and group; a chunk an array
    retired = "labeled/000/.000000.zarr.retired.tmp"
    again = [f"{WRITTEN} {retired} 0", f"{RENAMED} {retired} 0", f"{RENAMED} {group} 0"]
    sidecar = [one for one in first if ".json" in one and f"{group}/" not in one]
    assert len(sidecar) == 3
    second, index = "labeled/000/000001.zarr", "index/labeled-000000.arrow"
    later = [one for one in zarr.steps if one.split()[1] in (second, index)]
    assert len(later) == 2 + 3
    moments = [
        *files[::3],
        f"{WRITTEN} {group} 0",
        f"{RENAMED} {group} 0",
        *again,
        *sidecar,
        *later,
    ]
    cache, num_killed = zarr.folder / "killed", 0
    for step in moments:
        if _run(zarr, cache, die_at=step) == 0:  # it had come past this step before
            _compare(zarr, cache, f"at: {step}")
            continue
        assert _lines(cache, "step")[-1] == step
        num_killed += 1
    assert num_killed >= len(files[::3]) + 2 + len(again) + len(sidecar)
    _complete(zarr, cache, "at every step of a Zarr shard")


def test_a_conversion_killed_on_its_way(stage_one: StageOne) -> None:
    source = stage_one.folder / "whole"

    def run(out: Path, **more: object) -> int:
        config = ConvertConfig.of(cache=source, out=out, format="zarr", device="cpu")
        Path(f"{out}.log").write_text("")
        return stage_one.server.run(
            "convert",
            config=config.model_dump_json(),
            log=f"{out}.log",
            shards_per_folder=SHARDS_PER_FOLDER,
            **more,
        )

    whole = stage_one.folder / "converted-whole"
    assert run(whole) == 0, stage_one.server.output.read_text()
    out = stage_one.folder / "converted"
    moments = [
        step
        for step in _lines(whole, "step")
        if ("/000001" in step and not step.startswith(HALF_WRITTEN)) or "index/" in step
    ]
    num_killed = 0
    for step in moments:
        before = _durable(out)
        num_killed += run(out, die_at=step) == -signal.SIGKILL
        assert not _shards(out, "forward") & before
    assert num_killed >= 6
    assert run(out) == 0, stage_one.server.output.read_text()
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("has_corpora", [False, True])
def test_killed_while_it_makes_views(
    tmp_path: Path, stage_one: StageOne, has_corpora: bool
) -> None:
    changes = {"views": 1, "shard_documents": 6}
    config = stage_one.config.model_copy(update=changes)
    viewing = _uninterrupted(stage_one.server, config, tmp_path, num_shards=2 * (2 + 2))
    before = replace(viewing, config=config.model_copy(update={"views": 0}))
    shards = [
        step
        for step in viewing.steps
        if viewed_split(step.split()[1].split("/")[0]) and not step.startswith(HALF_WRITTEN)
    ]
    assert len(shards) == 2 * 2 * (2 + 2)  # shard and sidecar, before and after they get a name
    for idx, step in enumerate(shards):
        cache = tmp_path / f"views-{idx}"
        if has_corpora:
            assert _run(before, cache) == 0
        assert _run(viewing, cache, die_at=step) == -signal.SIGKILL, step
        _complete(viewing, cache, f"at: {step}")


def test_killed_at_random_moments_again_and_again(either_stage_one: StageOne) -> None:
    stage_one = either_stage_one
    rng = random.Random(0)
    cache, num_killed, num_caches = stage_one.folder / "random-0", 0, 1
    while num_killed < NUM_RANDOM_KILLS:
        Path(f"{cache}.log").write_text("")
        before = _durable(cache)
        arguments = _arguments(stage_one.config, cache)
        process_id = stage_one.server.start("cache_teacher", **arguments)
        time.sleep(rng.random() * stage_one.seconds)
        os.kill(process_id, signal.SIGKILL)
        code = stage_one.server.wait()
        _check_kept(cache, before)
        num_killed += code == -signal.SIGKILL
        if code == 0:  # it was done before the kill: go on with another
            _compare(stage_one, cache, "at random")
            cache, num_caches = stage_one.folder / f"random-{num_caches}", num_caches + 1
    _complete(stage_one, cache, "at random")


def test_interrupted_says_how_to_go_on_and_does(
    tmp_path: Path, server: ForkServer, small_teacher: Path, acl_imdb: Path
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "output.txt"
    arguments = [
        *("cache-teacher", "--data", str(acl_imdb), "--teacher", str(small_teacher)),
        *("--out", str(cache), "--shard-documents", "1", "--max-length", "64"),
        *("--max-samples", "40", "--unlabeled-max-samples", "20"),
    ]
    process_id = server.start("pipe", arguments=arguments, output=str(output))
    deadline = time.monotonic() + 30
    while len(_durable(cache)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process_id, signal.SIGINT)
    assert server.wait() == 130, output.read_text()
    said = output.read_text()
    assert f"interrupted: go on from here with: pipe {' '.join(arguments)}" in said
    assert "Traceback" not in said
    num_done = len(_durable(cache))
    assert 3 <= num_done < 60
    assert not list(cache.rglob("*.tmp")) and not (cache / "writer.lock").exists()

    assert server.run("pipe", arguments=arguments, output=str(output)) == 0, output.read_text()
    assert f"{60 - num_done} shards computed, {num_done} kept" in output.read_text()
    assert verify(cache).problems == ()
    assert len(CacheReader(cache)) == 40 and len(CacheReader(cache, "unlabeled")) == 20
