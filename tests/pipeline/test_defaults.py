"""The defaults of the design hold out of the box."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teacher_cache.pipeline.cli import SECTIONS
from teacher_cache.pipeline.options import CacheTeacherOptions, FinetuneTeacherOptions
from teacher_cache.pipeline.presets import resolve_cache_teacher
from teacher_cache.pipeline.settings import resolve
from teacher_cache.stages.training.config import TrainStudentConfig
from tests.command_line import done

STUDENT = {
    "arch": "mamba2",
    "d_model": 256,
    "num_layers": 4,
    "expand": 3,
    "d_state": 48,
    "head_dim": 96,
    "pooling": "cls",
    "head": "mlp",
}
OBJECTIVE = {
    "conf_power": 0,
    "alpha": 0.5,
    "temperature": 2,
    "divergence": "kl",
    "label_smoothing": 0,
    "unlabeled_alpha": 0,
}
TRAINING = {
    "on_mismatch": "error",
    "resume": "auto",
    "report_to": "none",
    "early_stopping": None,
    "unlabeled_ratio": 1,
    "dtype": "auto",
    "device": "auto",
}


def test_train_student() -> None:
    config = resolve(
        TrainStudentConfig,
        section="train_student",
        sections=SECTIONS,
        config_file=None,
        settings=[],
        flags={},
    )
    wanted = STUDENT | OBJECTIVE | TRAINING
    found = config.model_dump()
    assert {name: found[name] for name in wanted} == wanted


def test_cache_teacher() -> None:
    config = resolve_cache_teacher(CacheTeacherOptions.of(data="imdb"))
    assert config.unlabeled is not None and config.unlabeled.max_samples == 5000
    assert config.labeled.max_samples is None
    shards, forward = config.shards, config.forward
    assert (shards.shard_mb, forward.dtype, forward.device) == (64, "auto", "auto")
    assert (forward.trust_remote_code, shards.overwrite, config.fallback) == (False, False, ())


def test_finetune_teacher() -> None:
    options = FinetuneTeacherOptions.of(data="demo").training
    assert (options.dtype, options.device, options.resume) == ("auto", "auto", "auto")


def test_a_student_out_of_the_box(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache has unlabelled text, which takes no part; nothing is said but how long to train.
    monkeypatch.chdir(tmp_path)
    done("train-student", "--cache", tiny_cache, "--max-steps", "1", "--batch-size", "2")
    (run,) = Path("runs").iterdir()
    assert run.name.startswith(f"{tiny_cache.name}-")
    model = json.loads((run / "config.json").read_text())
    assert {name: model[name] for name in STUDENT} == STUDENT
    # Mamba-2's kernels want this to be a multiple of 8.
    inner = STUDENT["expand"] * STUDENT["d_model"]
    assert (2 * inner + 2 * STUDENT["d_state"] + inner // STUDENT["head_dim"]) % 8 == 0
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in OBJECTIVE} == OBJECTIVE
    assert settings["on_mismatch"] == "error"
