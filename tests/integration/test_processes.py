"""Training in several processes: what it computes, what it leaves, how it ends and goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from teacher_cache.cache.lock import writer_lock
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.integration.fork_server import ForkServer
from tests.integration.processes_child import few_batches, few_samples
from tests.tiny_models import write_start
from tests.tiny_runs import (
    cache_language,
    cache_reviews,
    result_files,
    result_log,
    student_config,
)

KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Trainings in forked processes.

    Attributes:
        server: forks them.
        cache: they train from it; it has pooled states.
        folder: for runs.
    """

    server: ForkServer
    cache: Path
    folder: Path

    def run(self, number: int, function: str, **arguments: Any) -> int:
        """Run a function of the child's module; returns the first exit code that is not 0."""
        return self.server.run("in_processes", number=number, task=function, arguments=arguments)

    def train(self, number: int, run: Path, *, die: tuple[int, str] = (0, ""), **more: Any) -> int:
        """Stage two; `die` names a process and the step at which it kills itself."""
        config = self.config(run, **more).model_dump_json(exclude_unset=True)
        return self.run(number, "train_student", config=config, dying_rank=die[0], die_at=die[1])

    def config(self, run: Path, **changes: Any) -> TrainStudentConfig:
        """Everything that draws or counts: dropout, both kinds, weights, micro-batches."""
        settings: dict[str, Any] = {
            "dropout": 0.2,
            "unlabeled_alpha": 0.3,
            "conf_power": 1.0,
            "gradient_accumulation": 2,
            "log_steps": 2,
            "max_steps": 8,
            "early_stopping": 5,
        }
        return student_config(self.cache, run, **(settings | changes))

    def said(self, number: int, run: Path) -> list[str]:
        """What each process made of its training."""
        return [Path(f"{run}.{rank}.txt").read_text() for rank in range(number)]


@pytest.fixture(scope="module")
def processes(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path
) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("processes")
    cache = cache_reviews(folder / "cache", tiny_bert, acl_imdb, hidden="pooled")
    with ForkServer("tests.integration.processes_child", folder / "output.txt") as server:
        found = Processes(server=server, cache=cache, folder=folder)
        server.call(
            "warm_up", config=found.config(folder / "warm").model_dump_json(exclude_unset=True)
        )
        yield found


def in_float64(
    processes: Processes, folder: Path, number: int, accumulation: int, classifier: Path | None
) -> list[dict[str, Any]]:
    """What each process ends with."""
    code = processes.run(
        number,
        "train_in_float64",
        cache=str(processes.cache),
        folder=str(folder),
        accumulation=accumulation,
        classifier=classifier and str(classifier),
    )
    assert code == 0, processes.server.output.read_text()
    return [torch.load(f"{folder}.{rank}.pt", weights_only=True) for rank in range(number)]


def without_clock(log: list[dict[str, float]]) -> list[dict[str, float]]:
    clock = ("runtime", "per_second", "total_flos")  # a share without samples reads one
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in log]


def test_the_batches_that_are_compared(processes: Processes) -> None:
    """Some leave a process of two, or of three, without samples: at the end of a step too."""
    sizes = [len(one) for one in few_batches(few_samples(processes.cache)[0], unlabeled_ratio=1.0)]
    assert set(sizes) == {4, 2, 1}
    assert {1, 2} <= set(sizes[2::3])
    sizes = [len(one) for one in few_batches(few_samples(processes.cache)[0], unlabeled_ratio=0.0)]
    assert sizes.count(1) == 3


@pytest.mark.parametrize(
    ("accumulation", "is_teacher"), [(1, False), (3, False), (1, True), (3, True)]
)
def test_the_number_of_processes_changes_nothing(
    processes: Processes, tmp_path: Path, tiny_bert: Path, accumulation: int, is_teacher: bool
) -> None:
    """Every gradient, every weight, every line of the log, in float64, in every process."""
    classifier = tiny_bert if is_teacher else None
    (alone,) = in_float64(processes, tmp_path / "alone", 1, accumulation, classifier)
    log = without_clock(alone["log"])
    names = {name for line in log for name in line}
    assert {"loss", "grad_norm", "eval_loss", "eval_ece", "train_loss"} <= names
    assert is_teacher or {"kd", "kd_unlabeled", "ce", "conf_w", "lm", "pooled"} <= names
    for number in (2, 3):
        several = in_float64(processes, tmp_path / str(number), number, accumulation, classifier)
        for found in several:
            assert len(found["log"]) == len(log)
            for line, expected in zip(without_clock(found["log"]), log, strict=True):
                assert line == pytest.approx(expected, rel=1e-12, abs=1e-12)
            for step, expected in zip(found["gradients"], alone["gradients"], strict=True):
                torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("arch", ["mamba2", "gpt2", "llama"])
def test_a_language_model_in_two_processes_is_one_run(
    processes: Processes, small_language_model: Path, acl_imdb: Path, tmp_path: Path, arch: str
) -> None:
    """A Mamba; a pre-trained model whose head is its table; one with a head of its own.

    A batch of three leaves one process a sample more, the last one of a corpus perhaps none.
    """
    cache = cache_language(tmp_path / "cache", small_language_model, acl_imdb)
    changes: dict[str, Any] = {
        "batch_size": 3, "unlabeled_alpha": 0.3, "conf_power": 1.0, "gradient_accumulation": 2,
    }  # fmt: skip
    config = student_config(cache, tmp_path, **changes)
    if arch != "mamba2":
        tokenizer = AutoTokenizer.from_pretrained(small_language_model)
        start = write_start(tmp_path / "start", arch, tokenizer)
        shape = {"d_model", "num_layers", "expand", "d_state", "head_dim"}
        settings = {name: one for name, one in config.given.items() if name not in shape}
        config = TrainStudentConfig.of(**settings | {"arch": f"hf:{start}"})
    alone, two = tmp_path / "alone", tmp_path / "two"
    for number, run in ((1, alone), (2, two)):
        own = config.model_copy(update={"out": run}).model_dump_json(exclude_unset=True)
        code = processes.run(number, "train_student", config=own)
        assert code == 0, processes.server.output.read_text()[-2000:]
    log = result_log(alone)
    assert {"kd", "ce", "kd_unlabeled", "eval_kl"} <= {name for line in log for name in line}
    for line, expected in zip(result_log(two), log, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    weights = [load_file(run / "model.safetensors") for run in (two, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=2e-5)
    assert read_run(two).settings == read_run(alone).settings


def test_a_run_in_two_processes_is_one_run(processes: Processes, tmp_path: Path) -> None:
    assert processes.train(1, tmp_path / "alone", dropout=0.0) == 0
    assert processes.train(2, tmp_path / "two", dropout=0.0) == 0
    assert processes.said(2, tmp_path / "two") == ["complete before: False"] * 2
    alone, two = result_files(tmp_path / "alone"), result_files(tmp_path / "two")
    assert alone.keys() == two.keys()
    assert (read_run(tmp_path / "two").result or {})["num_processes"] == 2
    assert read_run(tmp_path / "alone").settings == read_run(tmp_path / "two").settings
    logs = zip(result_log(tmp_path / "two"), result_log(tmp_path / "alone"), strict=True)
    for line, expected in logs:
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)
    weights = [load_file(tmp_path / one / "model.safetensors") for one in ("two", "alone")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    # A second call finds it complete in both, and changes nothing.
    assert processes.train(2, tmp_path / "two", dropout=0.0) == 0
    assert processes.said(2, tmp_path / "two") == ["complete before: True"] * 2
    assert result_files(tmp_path / "two") == two


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_processes_go_on_bit_for_bit(
    processes: Processes, tmp_path: Path, rank: int
) -> None:
    """With dropout, which each process draws from its own random state."""
    whole, run = processes.folder / "whole", tmp_path / "run"
    assert processes.train(2, whole) == 0, processes.server.output.read_text()
    steps = {
        0: (
            "half-written write checkpoint/optimizer.pt",
            "before rename checkpoint/committed.json",
            "after rename checkpoint/committed.json",
            "half-written write model.safetensors",
        ),
        1: ("half-written write checkpoint/rng_state_1.pth",) * 2,
    }
    for step in steps[rank]:
        assert processes.train(2, run, die=(rank, step)) == KILLED, step
        assert not read_run(run).complete
    assert processes.train(2, run) == 0
    assert result_files(run) == result_files(whole)


def test_each_process_draws_its_own_dropout(processes: Processes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert processes.train(2, run) == 0
    (checkpoint, *_) = sorted(run.glob("checkpoints/checkpoint-*"))
    states = [torch.load(checkpoint / f"rng_state_{i}.pth", weights_only=False) for i in (0, 1)]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(checkpoint))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_number_of_processes_goes_on(
    processes: Processes, tmp_path: Path, before: int, after: int
) -> None:
    """Equal up to rounding without dropout, and said, for the sake of those who have it."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert processes.train(1, whole, dropout=0.0) == 0
    die = (0, "after rename checkpoint/committed.json")
    assert processes.train(before, run, dropout=0.0, die=die) == KILLED
    assert processes.train(after, run, dropout=0.0) == 0
    weights = [load_file(one / "model.safetensors") for one in (run, whole)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    said = f"checkpoint-2 was written by {before} processes, and {after} go on"
    assert processes.server.output.read_text().count(said) == 1


def test_what_the_main_process_refuses_ends_all(processes: Processes, tmp_path: Path) -> None:
    with writer_lock(tmp_path / "locked"):
        assert processes.train(2, tmp_path / "locked") == 2
    assert processes.train(2, tmp_path / "run", max_steps=2) == 0
    assert processes.train(2, tmp_path / "run", max_steps=2, lr=0.5) == 2
    for run, expected in (("locked", "is being written by another process"), ("run", "lr is")):
        first, second = processes.said(2, tmp_path / run)
        assert first == second
        assert expected in first
