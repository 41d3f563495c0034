"""Kill a training wherever it can be killed: it ends in the weights of the one that never was."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import MARKER_NAME, RUN_NAME, read_run
from tests.headed import cache_labeled, write_headed_bert, write_labeled
from tests.integration.fork_server import ForkServer
from tests.tiny_runs import cache_language, cache_reviews, result_files, student_config

NUM_RANDOM_KILLS = 8
EVERYTHING = {
    "unlabeled_alpha": 0.3,
    "conf_power": 1.0,
    "gradient_accumulation": 2,
    "log_steps": 2,
    "max_steps": 16,
}
RECORD = f"rename {RUN_NAME}"


@dataclass(frozen=True, kw_only=True)
class StageTwo:
    """Trainings of one configuration.

    Attributes:
        server: forks them.
        config: without `out`.
        folder: for runs and logs.
        whole: files of an uninterrupted run, without checkpoints.
        steps: of the uninterrupted run, in order.
        seconds: that it took.
    """

    server: ForkServer
    config: TrainStudentConfig
    folder: Path
    whole: dict[str, bytes]
    steps: list[str]
    seconds: float

    def run(self, run: Path, die_at: str | None = None) -> int:
        """Train in a child until it ends, or dies; return its exit code."""
        return self.server.run("train_student", **_arguments(self.config, run), die_at=die_at)


def _arguments(config: TrainStudentConfig, run: Path) -> dict[str, Any]:
    config = config.model_copy(update={"out": run})
    return {"config": config.model_dump_json(exclude_unset=True), "log": f"{run}.log"}


def _steps(run: Path) -> list[str]:
    return Path(f"{run}.log").read_text().splitlines()


@pytest.fixture(scope="module")
def classifiers_config(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path
) -> TrainStudentConfig:
    """Everything that draws or counts: dropout, both kinds, weights, micro-batches, evaluations."""
    folder = tmp_path_factory.mktemp("killed-training")
    cache = cache_reviews(folder / "cache", tiny_bert, acl_imdb)
    return student_config(cache, folder / "warm", dropout=0.2, **EVERYTHING)


@pytest.fixture(scope="module")
def language_models_config(
    tmp_path_factory: pytest.TempPathFactory, small_language_model: Path, acl_imdb: Path
) -> TrainStudentConfig:
    """The same of a language model's cache, which has no dropout."""
    folder = tmp_path_factory.mktemp("killed-language-training")
    cache = cache_language(folder / "cache", small_language_model, acl_imdb)
    return student_config(cache, folder / "warm", **EVERYTHING | {"batch_size": 2})


@pytest.fixture(scope="module")
def labels_config(
    tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase
) -> TrainStudentConfig:
    """The same of pairs with any of three labels."""
    folder = tmp_path_factory.mktemp("killed-labels-training")
    data = write_labeled(folder / "pairs.jsonl", "multi_label_classification", second="claim")
    teacher = write_headed_bert(folder / "teacher", bert_tokenizer, "multi_label_classification")
    cache = cache_labeled(folder / "cache", teacher, data, text_column="text,claim", views=1)
    return student_config(cache, folder / "warm", dropout=0.2, **EVERYTHING)


@pytest.fixture(scope="module")
def numbers_config(
    tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase
) -> TrainStudentConfig:
    """The same of a number, which has no weights by confidence."""
    folder = tmp_path_factory.mktemp("killed-numbers-training")
    data = write_labeled(folder / "texts.jsonl", "regression")
    teacher = write_headed_bert(folder / "teacher", bert_tokenizer, "regression")
    cache = cache_labeled(folder / "cache", teacher, data, views=1)
    weighed = {name: one for name, one in EVERYTHING.items() if name != "conf_power"}
    return student_config(cache, folder / "warm", dropout=0.2, **weighed)


@pytest.fixture(
    scope="module",
    params=["classifiers_config", "language_models_config", "labels_config", "numbers_config"],
)
def stage_two(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StageTwo]:
    folder = tmp_path_factory.mktemp(request.param)
    config = request.getfixturevalue(request.param)
    with ForkServer("tests.integration.train_student_child", folder / "output.txt") as server:
        server.call("warm_up", config=config.model_dump_json(exclude_unset=True))
        whole = folder / "whole"
        started = time.monotonic()
        code = server.run("train_student", **_arguments(config, whole))
        assert code == 0, server.output.read_text()
        yield StageTwo(
            server=server,
            config=config,
            folder=folder,
            whole=result_files(whole),
            steps=_steps(whole),
            seconds=time.monotonic() - started,
        )


def test_the_order_of_a_save(stage_two: StageTwo) -> None:
    """Everything is written, then the marker, and only then an old checkpoint goes."""
    *saves, end = " | ".join(stage_two.steps).split(f"after rename checkpoint/{MARKER_NAME}")
    assert len(saves) == 8
    for save in saves:
        last = save[save.rindex("write checkpoint/") :]
        assert (
            last
            == f"write checkpoint/trainer_state.json | before rename checkpoint/{MARKER_NAME} | "
        )
    for save in (*saves[3:], end):  # from the third checkpoint on, after its marker
        removed = save.split("write checkpoint/")[0]
        assert removed.index(f"remove checkpoint/{MARKER_NAME}") < removed.index("checkpoint/any")
    # The result: model and tokenizer, and last the record that says that it is complete.
    assert end.index("half-written write model.safetensors") < end.index(f"after {RECORD}")


def test_killed_at_every_step(stage_two: StageTwo) -> None:
    """One run, killed at every kind of step: each restart goes on from what the last one left."""
    run = stage_two.folder / "steps"
    kinds = dict.fromkeys(stage_two.steps)
    of_checkpoints = [step for step in kinds if "checkpoint" in step]
    assert len(of_checkpoints) >= 14
    at_last = [*(step for step in kinds if "write model.safetensors" in step), f"before {RECORD}"]
    for step in (f"before {RECORD}", f"after {RECORD}", *of_checkpoints, *at_last):
        assert stage_two.run(run, die_at=step) == -signal.SIGKILL, step
        if (run / RUN_NAME).exists():
            assert not read_run(run).complete, step
    assert stage_two.run(run) == 0
    assert result_files(run) == stage_two.whole


def test_killed_at_random_moments(stage_two: StageTwo) -> None:
    """Until enough kills have struck; a training that ends before the next one must be whole."""
    rng, killed, ended = random.Random(0), 0, 0
    while killed < NUM_RANDOM_KILLS:
        run = stage_two.folder / f"random-{ended}"
        child = stage_two.server.start("train_student", **_arguments(stage_two.config, run))
        time.sleep(rng.uniform(0.0, 0.6) * stage_two.seconds)
        os.kill(child, signal.SIGKILL)
        code = stage_two.server.wait()
        assert code in (0, -signal.SIGKILL), stage_two.server.output.read_text()
        killed += code != 0
        if code == 0:
            assert result_files(run) == stage_two.whole
            ended += 1
        assert ended < NUM_RANDOM_KILLS
    assert stage_two.run(run) == 0
    assert result_files(run) == stage_two.whole


def test_interrupted_from_the_keyboard(
    classifiers_config: TrainStudentConfig, tmp_path: Path
) -> None:
    """The real command: exit code 130, and the line that goes on from there."""
    run = tmp_path / "run"
    config = classifiers_config
    command = [
        "train-student", "--cache", str(config.training.cache), "--out", str(run),
        "--device", "cpu",
        "--d-model", "8", "--num-layers", "1", "--expand", "2", "--d-state", "4",
        "--head-dim", "8", "--batch-size", "8", "--max-steps", "100000", "--checkpoint-steps", "5",
    ]  # fmt: skip
    process = subprocess.Popen(
        [Path(sys.executable).with_name("pipe"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Behind `&` a shell has its commands ignore the interruption, and their children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 180
        while not list(run.glob(f"checkpoints/*/{MARKER_NAME}")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    last = said.splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert last.endswith(f": {shlex.join(['pipe', *command])}")
    assert "Traceback" not in said
    assert not read_run(run).complete
