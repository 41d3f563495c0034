"""The real launcher: `torchrun --no-python pipe ...`, as the README has it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from teacher_cache.cache.lock import LOCK_NAME
from teacher_cache.stages.training.run_folder import MARKER_NAME, read_run
from tests.command_line import TINY_STUDENT, done
from tests.tiny_models import write_start
from tests.tiny_runs import cache_language, result_files, result_log

BIN = Path(sys.executable).parent
LIMIT_S = 300
PLAIN = ("--device", "cpu", "--dropout", "0", "--unlabeled-alpha", "0.3")


@contextmanager
def launched(*args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in two processes, which end with the body."""
    process = subprocess.Popen(
        [BIN / "torchrun", "--nproc-per-node", "2", "--no-python", BIN / "pipe", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "240"},
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and the two streams, when it is done."""
    stdout, stderr = process.communicate(timeout=LIMIT_S)
    return process.returncode, stdout, stderr


def outcome(*args: str | Path) -> tuple[int, str, str]:
    """Run a command in two processes: exit code and the two streams."""
    with launched(*args) as process:
        return ended(process)


def distil(cache: Path, run: Path, *more: str) -> tuple[str | Path, ...]:
    return ("train-student", "--cache", cache, "--out", run, *TINY_STUDENT, *PLAIN, *more)


@pytest.mark.slow
def test_torchrun_trains_one_student(bert_cache: Path, tmp_path: Path) -> None:
    done(*distil(bert_cache, tmp_path / "alone"))
    run = tmp_path / "two"
    code, said, notes = outcome(*distil(bert_cache, run))
    assert code == 0, notes
    assert said.count("trained: ") == said.count("6 steps") == said.count("step 6, held out") == 1
    assert "Warning" not in notes
    assert len(list(run.rglob("run.json"))) == 1
    weights = [load_file(one / "model.safetensors") for one in (run, tmp_path / "alone")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    for line, expected in zip(result_log(run), result_log(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)

    before = result_files(run)
    code, said, _ = outcome(*distil(bert_cache, run))
    assert (code, said.count("was trained before")) == (0, 1)
    assert result_files(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mamba2", "gpt2", "llama"])
def test_torchrun_trains_one_language_model(
    small_language_model: Path, acl_imdb: Path, tmp_path: Path, arch: str
) -> None:
    """A Mamba, a pre-trained model with a tied head, and one with a head of its own."""
    cache = cache_language(tmp_path / "cache", small_language_model, acl_imdb)
    if arch == "mamba2":
        shape = TINY_STUDENT[: TINY_STUDENT.index("--batch-size")]
    else:
        tokenizer = AutoTokenizer.from_pretrained(small_language_model)
        start = write_start(tmp_path / "start", arch, tokenizer)
        shape = ("--arch", f"hf:{start}", "--dtype", "float32")
    command = (
        "train-student", "--cache", cache, "--device", "cpu", "--unlabeled-alpha", "0.3", *shape,
        "--batch-size", "3", "--max-steps", "6", "--checkpoint-steps", "3",
        "--eval-fraction", "0.3", "--log-steps", "1",
    )  # fmt: skip
    alone, run = tmp_path / "alone", tmp_path / "two"
    done(*command, "--out", alone)
    code, said, notes = outcome(*command, "--out", run)
    assert code == 0, notes
    assert said.count("trained: ") == said.count("step 6, held out") == 1
    weights = [load_file(one / "model.safetensors") for one in (run, alone)]
    torch.testing.assert_close(*weights, rtol=0, atol=2e-5)
    lines = result_log(alone)
    assert any("eval_kl" in line for line in lines) and any("kd_unlabeled" in one for one in lines)
    for line, expected in zip(result_log(run), lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_torchrun_says_once_what_is_wrong(bert_cache: Path, bert_run: Path) -> None:
    """Our sentence stands alone before torchrun's own report, whose exit code is always 1."""
    for arguments, sentence in (
        (distil(bert_cache, bert_run, "--lr", "0.5"), "was made with other settings"),
        (("inspect", bert_cache), "this command runs in one"),
        (distil(bert_cache / "none", bert_run), "none"),
    ):
        code, _, notes = outcome(*arguments)
        ours, _, report = notes.partition("\nW")
        assert code == 1
        assert notes.count("error: ") == 1, notes
        assert ours.splitlines()[-1].startswith("error: ")
        assert sentence in ours
        assert "Traceback" not in ours
        assert "exitcode  : 2" in report


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_torchrun_is_stopped_and_goes_on(
    bert_cache: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """A process is killed, or the launcher interrupted: all end, and go on as if nothing was."""
    more = ("--dropout", "0.2", "--max-steps", "200", "--checkpoint-steps", "20")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert outcome(*distil(bert_cache, whole, *more))[0] == 0
    with launched(*distil(bert_cache, run, *more)) as process:
        deadline = time.monotonic() + LIMIT_S
        while not list(run.glob(f"checkpoints/*/{MARKER_NAME}")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        main_process = json.loads((run / LOCK_NAME).read_text())["pid"]
        os.kill(main_process if how == signal.SIGKILL else process.pid, how)
        code, _, notes = ended(process)
    assert code == 1
    if how == signal.SIGINT:
        assert notes.count("interrupted: go on from here under torchrun again, with: pipe") == 1
        assert notes.count("Traceback") == 1  # torchrun's own
    assert not read_run(run).complete
    code, said, notes = outcome(*distil(bert_cache, run, *more))
    assert code == 0, notes
    assert "going on from checkpoint-" in said
    assert result_files(run) == result_files(whole)


@pytest.mark.slow
def test_torchrun_fine_tunes_one_teacher(acl_imdb: Path, tiny_bert: Path, tmp_path: Path) -> None:
    for name in ("alone", "two"):
        command = (
            "finetune-teacher", "--data", acl_imdb, "--model", tiny_bert, "--out", tmp_path / name,
            "--batch-size", "8", "--max-steps", "6", "--checkpoint-steps", "3", "--device", "cpu",
            "--max-length", "24",
        )  # fmt: skip
        if name == "alone":
            done(*command)
        else:
            code, said, notes = outcome(*command)
            assert code == 0, notes
            assert said.count("fine-tuned") == 1
            assert "Warning" not in notes
    found, expected = (read_run(tmp_path / name) for name in ("two", "alone"))
    assert found.settings == expected.settings
    assert found.result is not None and found.result["num_steps"] == 6
