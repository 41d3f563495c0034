from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.training import arguments
from teacher_cache.stages.training.arguments import (
    checkpoint_to_resume,
    refuse_what_cannot_start,
    training_arguments,
)
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.run_folder import RunRecord, commit_checkpoint


def resolved(folder: Path, config: OptimizationConfig, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "num_steps": 100,
        "steps_per_epoch": 40,
        "evaluates": True,
        "keeps_best": True,
        "label_names": ["labels"],
    }
    return training_arguments(config, folder, **(given | changes))


def test_the_settings_reach_the_trainer(tmp_path: Path) -> None:
    config = OptimizationConfig(
        device="cpu",
        batch_size=7,
        gradient_accumulation=3,
        lr=0.25,
        weight_decay=0.125,
        warmup=0.1,
        schedule="linear",
        log_steps=4,
        seed=9,
    )
    found = resolved(tmp_path, config)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (7, 3)
    assert (found.learning_rate, found.weight_decay, found.warmup_steps) == (0.25, 0.125, 10)
    assert (found.lr_scheduler_type, found.logging_steps, found.seed) == ("linear", 4, 9)
    assert (found.max_steps, found.eval_steps, found.save_steps) == (100, 40, 40)
    assert found.load_best_model_at_end and found.metric_for_best_model == "accuracy"
    assert not found.logging_nan_inf_filter
    assert found.output_dir == str(tmp_path / "checkpoints")
    assert found.save_total_limit is None  # we remove old checkpoints ourselves


@pytest.mark.parametrize(("asked", "steps"), [(None, 40), (15, 15), (500, 100)])
def test_checkpoints_come_each_epoch_or_as_asked(
    tmp_path: Path, asked: int | None, steps: int
) -> None:
    config = OptimizationConfig(device="cpu", checkpoint_steps=asked)
    found = resolved(tmp_path, config)
    assert (found.eval_steps, found.save_steps) == (steps, steps)


def test_without_held_out_samples_nothing_is_evaluated(tmp_path: Path) -> None:
    found = resolved(tmp_path, OptimizationConfig(), evaluates=False, keeps_best=False)
    assert found.eval_strategy == "no"
    assert not found.load_best_model_at_end


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, (True, False, False)),
        ("cpu", torch.bfloat16, (True, True, False)),
        ("cuda", torch.bfloat16, (False, True, False)),
        ("cuda", torch.float16, (False, False, True)),
    ],
)
def test_the_number_format_is_the_devices(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    expected: tuple[bool, bool, bool],
) -> None:
    monkeypatch.setattr(arguments, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(arguments, "resolve_dtype", lambda *_: dtype)
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **given: given)  # needs the device
    found: Any = resolved(tmp_path, OptimizationConfig())
    assert (found["use_cpu"], found["bf16"], found["fp16"]) == expected
    assert found["dataloader_pin_memory"] == (device == "cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "resolve_device", lambda config: torch.device(config.device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    refuse_what_cannot_start(OptimizationConfig(device="cuda"))  # not torchrun's: no LOCAL_RANK
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    refuse_what_cannot_start(OptimizationConfig(device="cpu"))
    with pytest.raises(UserError, match=r"4 processes .* 2 CUDA devices.*--nproc-per-node"):
        refuse_what_cannot_start(OptimizationConfig(device="cuda"))


def test_a_reporter_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install trackio"):
        refuse_what_cannot_start(OptimizationConfig(report_to="trackio"))


def write_run(folder: Path, *steps: int, seed: int = 0) -> Path:
    RunRecord(settings={"seed": seed}, about={}).write(folder)
    for step in steps:
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"%d" % step)
        commit_checkpoint(checkpoint)
    return folder


def test_where_to_go_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, 4)
    older = run / "checkpoints" / "checkpoint-2"
    assert checkpoint_to_resume(OptimizationConfig(), run) == older.with_name("checkpoint-4")
    assert checkpoint_to_resume(OptimizationConfig(resume="never"), run) is None
    assert checkpoint_to_resume(OptimizationConfig(resume=str(older)), run) == older
    assert checkpoint_to_resume(OptimizationConfig(), write_run(tmp_path / "new")) is None


def test_a_checkpoint_of_the_same_settings_may_lie_elsewhere(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", 2)
    named = str(other / "checkpoints" / "checkpoint-2")
    assert checkpoint_to_resume(OptimizationConfig(resume=named), run) == Path(named)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", 2, seed=1)
    named = str(other / "checkpoints" / "checkpoint-2")
    with pytest.raises(UserError, match=r"checkpoint-2 was made with other settings: seed is 1"):
        checkpoint_to_resume(OptimizationConfig(resume=named), run)


def test_a_name_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no complete checkpoint"):
        checkpoint_to_resume(OptimizationConfig(resume="allways"), write_run(tmp_path / "run"))
    with pytest.raises(UserError, match="is no complete checkpoint"):
        refuse_what_cannot_start(OptimizationConfig(resume=str(tmp_path / "nowhere")))
