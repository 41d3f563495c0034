from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    pipeline,
)

import teacher_cache.stages.student  # noqa: F401  (registers the student)
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.lock import writer_lock
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import cache_teacher, train_student
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.join.join import Joined, TokenizationMismatch
from teacher_cache.stages.train_student import StageTwoObserver
from teacher_cache.stages.training.batches import held_out
from teacher_cache.stages.training.measures import agreement_metrics, classification_metrics
from teacher_cache.stages.training.run_folder import read_run
from teacher_cache.stages.training.trainer import StudentTrainer
from tests.tiny_runs import MAX_LENGTH, read_tokenizers_once, student_config

# How long it took is no result.
CLOCK = ("runtime", "per_second")


class Interruption(Exception):
    """Stands for a kill: nothing in the code under test catches it."""


class Watcher(StageTwoObserver, TrainerCallback):
    """Writes down what it is told; interrupts at a step's end or after its checkpoint."""

    def __init__(self, *, before_save: int | None = None, after_save: int | None = None):
        self.joined: list[Joined] = []
        self.started: list[tuple[Path, int, Path | None]] = []
        self.steps: list[int] = []
        self._before_save = before_save
        self._after_save = after_save

    def on_join(self, joined: Joined) -> None:
        self.joined.append(joined)

    def on_start(self, run: Path, num_steps: int, checkpoint: Path | None) -> None:
        self.started.append((run, num_steps, checkpoint))

    def callbacks(self) -> list[TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self._before_save:
            raise Interruption

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._after_save:
            raise Interruption


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    lines = (read_run(run).result or {})["log"]
    return [
        {name: value for name, value in line.items() if not name.endswith(CLOCK)}
        for line in lines
        if "train_runtime" not in line
    ]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leaves out what takes longer than a tiny training: tokenizers, old garbage at its start."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        read_tokenizers_once(partial(patched.setattr, train_student))
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def run(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that used both kinds of samples."""
    out = tmp_path_factory.mktemp("runs") / "student"
    result = train_student.run(student_config(tiny_cache, out, unlabeled_alpha=0.3, conf_power=1.0))
    assert not result.was_complete
    return result.run


def test_the_folder_is_a_student_that_transformers_loads(run: Path, tiny_cache: Path) -> None:
    record = read_run(run)
    assert record.complete
    assert record.about["tokenization"] == "verified"
    classify: Any = pipeline("text-classification", model=str(run), device="cpu")
    assert classify("a good film")[0]["label"] in ("neg", "pos")
    assert AutoTokenizer.from_pretrained(run).model_max_length == MAX_LENGTH
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-4", "checkpoint-6"]


def test_the_final_evaluation_is_that_of_the_final_weights(run: Path, tiny_cache: Path) -> None:
    evaluation = (read_run(run).result or {})["evaluation"]
    reader = CacheReader(tiny_cache)
    chosen = np.flatnonzero(held_out(reader.sample_ids(), 0.2))
    samples = [reader.sample(int(sample_idx)) for sample_idx in chosen]
    model: Any = AutoModelForSequenceClassification.from_pretrained(run).eval()
    with torch.no_grad():
        ids = [torch.from_numpy(one["input_ids"].astype(np.int64))[None] for one in samples]
        logits = [model(one).logits[0].tolist() for one in ids]
    expected = {
        **classification_metrics(logits, [int(one["label"]) for one in samples]),
        **agreement_metrics(logits, [one["class_logits"] for one in samples]),
    }
    found = {name: evaluation[f"eval_{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_log_shows_every_term(run: Path) -> None:
    lines = [line for line in log_of(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for labeled, unlabeled in zip(lines[::2], lines[1::2], strict=True):  # one of each, in turn
        assert {"ce", "kd", "conf_w", "agreement"} <= labeled.keys()
        assert 0.5 <= labeled["conf_w"] <= 1
        assert "kd_unlabeled" in unlabeled and "ce" not in unlabeled
    evaluated = [line["step"] for line in log_of(run) if "eval_accuracy" in line]
    assert evaluated == [2, 4, 6]


def test_a_complete_run_is_left_alone(run: Path, tiny_cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    watcher = Watcher()
    config = student_config(tiny_cache, run, unlabeled_alpha=0.3, conf_power=1.0)
    result = train_student.run(config, watcher)
    assert result.was_complete
    assert result.record == read_run(run)
    assert not watcher.started
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr is 0\.001 there and 0\.5 in this command"),
        ({"unlabeled_alpha": 0.0}, r"unlabeled_alpha is 0\.3 there and 0\.0"),
        ({"d_model": 16}, "d_model is 8 there and 16"),
    ],
)
def test_other_settings_are_refused(
    run: Path, tiny_cache: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"unlabeled_alpha": 0.3, "conf_power": 1.0} | changes
    with pytest.raises(UserError, match=f"{message}.*--resume never"):
        train_student.run(student_config(tiny_cache, run, **given))


def test_what_changes_no_result_may_change(run: Path, tiny_cache: Path) -> None:
    given = {"unlabeled_alpha": 0.3, "conf_power": 1.0, "log_steps": 3, "report_to": "none"}
    assert train_student.run(student_config(tiny_cache, run, **given)).was_complete


def test_the_folder_has_a_name_of_its_own(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = set()
    for seed in (0, 1):
        config = student_config(tiny_cache, tmp_path, max_steps=1, seed=seed)
        result = train_student.run(config.model_copy(update={"out": None}))
        assert result.run.parent == Path("runs")
        assert result.run.name.startswith(f"{tiny_cache.name}-")
        names.add(result.run.name)
    assert len(names) == 2


def test_the_seed_and_nothing_else_decides(tiny_cache: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        torch.manual_seed(len(name))  # what was drawn before is of no concern
        np.random.seed(len(name))
        train_student.run(student_config(tiny_cache, tmp_path / name, seed=seed, max_steps=3))
    assert same_weights(tmp_path / "one", tmp_path / "again")
    assert not same_weights(tmp_path / "one", tmp_path / "other")


def test_unlabelled_samples_stay_out_unless_asked_for(tiny_cache: Path, tmp_path: Path) -> None:
    train_student.run(student_config(tiny_cache, tmp_path / "run"))
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert all("ce" in line and "kd_unlabeled" not in line for line in lines)
    assert all("conf_w" not in line for line in lines)


def interrupt(config: Any, **moment: int) -> None:
    with pytest.raises(Interruption):
        train_student.run(config, Watcher(**moment))


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    run: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = student_config(tiny_cache, tmp_path / "run", unlabeled_alpha=0.3, conf_power=1.0)
    interrupt(config, before_save=4)
    assert not read_run(tmp_path / "run").complete
    watcher = Watcher()
    train_student.run(config, watcher)
    ((_, num_steps, checkpoint),) = watcher.started
    assert (num_steps, watcher.steps) == (6, [3, 4, 5, 6])
    assert checkpoint == tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert same_weights(tmp_path / "run", run)
    assert log_of(tmp_path / "run") == log_of(run)


def test_next_tokens_and_the_teachers_embeddings_go_on_alike(
    tiny_cache: Path, tmp_path: Path
) -> None:
    options = {"lm_weight": 0.5, "embeddings": "teacher", "unlabeled_alpha": 0.3, "max_steps": 4}
    options["embedding_lr_scale"] = 0.1
    whole = student_config(tiny_cache, tmp_path / "whole", **options)
    train_student.run(whole)
    lines = [line for line in log_of(tmp_path / "whole") if "loss" in line]
    assert len(lines) == 4 and all(9 < line["lm"] < 12 for line in lines)  # log 30,522 is 10.3
    config = student_config(tiny_cache, tmp_path / "run", **options)
    interrupt(config, before_save=4)
    train_student.run(config)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    table = CacheReader(tiny_cache).manifest.teacher_files["embeddings.safetensors"]
    assert read_run(tmp_path / "run").settings["teacher_embeddings_sha256"] == table


def test_a_named_checkpoint(run: Path, tiny_cache: Path, tmp_path: Path) -> None:
    config = student_config(tiny_cache, tmp_path / "run", unlabeled_alpha=0.3, conf_power=1.0)
    interrupt(config, after_save=4)
    older = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    watcher = Watcher()
    train_student.run(config.model_copy(update={"resume": str(older)}), watcher)
    assert watcher.steps == [3, 4, 5, 6]
    assert same_weights(tmp_path / "run", run)


def test_a_damaged_checkpoint_is_written_anew(
    run: Path, tiny_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = student_config(tiny_cache, tmp_path / "run", unlabeled_alpha=0.3, conf_power=1.0)
    interrupt(config, after_save=4)
    damaged = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    (damaged / "optimizer.pt").write_bytes(b"")
    interrupt(config, after_save=4)
    assert f"skipped {damaged}" in caplog.text
    watcher = Watcher()
    train_student.run(config, watcher)
    assert watcher.steps == [5, 6]
    assert same_weights(tmp_path / "run", run)


def test_resume_never_starts_again(run: Path, tiny_cache: Path, tmp_path: Path) -> None:
    config = student_config(tiny_cache, tmp_path / "run", unlabeled_alpha=0.3, conf_power=1.0)
    interrupt(student_config(tiny_cache, tmp_path / "run", seed=5), after_save=2)
    watcher = Watcher()
    train_student.run(config.model_copy(update={"resume": "never"}), watcher)
    assert watcher.steps == [1, 2, 3, 4, 5, 6]
    assert same_weights(tmp_path / "run", run)


# Accuracies of the evaluations, whatever the student says: the best is the second.
ACCURACIES = (0.5, 0.7, 0.6, 0.7, 0.65, 0.6)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation's accuracy by its place in the training, resumed or not."""
    evaluate = StudentTrainer.evaluate

    def scripted_evaluate(trainer: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        accuracy = ACCURACIES[trainer.state.global_step // 2 - 1]
        trainer.compute_metrics = lambda _: {"accuracy": accuracy}
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "evaluate", scripted_evaluate)


def weights_after(tiny_cache: Path, folder: Path, step: int, **settings: Any) -> Path:
    """A checkpoint of a training that is interrupted as soon as it is committed."""
    interrupt(student_config(tiny_cache, folder, **settings), after_save=step)
    return folder / "checkpoints" / f"checkpoint-{step}"


@pytest.mark.usefixtures("scripted")
def test_early_stopping_ends_with_the_best_weights(tiny_cache: Path, tmp_path: Path) -> None:
    settings = {"early_stopping": 2, "max_steps": 12}
    result = train_student.run(student_config(tiny_cache, tmp_path / "run", **settings))
    found = result.record.result or {}
    assert (found["num_steps"], found["best_step"]) == (8, 4)
    assert (found["evaluation"]["step"], found["evaluation"]["eval_accuracy"]) == (4, 0.7)
    best = weights_after(tiny_cache, tmp_path / "other", 4, **settings)
    assert same_weights(tmp_path / "run", best)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("killed_at", [6, 8])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(
    tiny_cache: Path, tmp_path: Path, killed_at: int
) -> None:
    config = student_config(tiny_cache, tmp_path / "run", early_stopping=2, max_steps=12)
    interrupt(config, after_save=killed_at)  # after the last evaluation too
    result = train_student.run(config)
    found = result.record.result or {}
    assert found["best_step"] == 4
    evaluated = [line["step"] for line in log_of(tmp_path / "run") if "eval_accuracy" in line]
    assert evaluated == [2, 4, 6, 8]
    best = weights_after(tiny_cache, tmp_path / "other", 4, early_stopping=2, max_steps=12)
    assert same_weights(tmp_path / "run", best)


@pytest.mark.usefixtures("scripted")
def test_without_early_stopping_the_last_weights_are_kept(tiny_cache: Path, tmp_path: Path) -> None:
    result = train_student.run(student_config(tiny_cache, tmp_path / "run", max_steps=8))
    found = result.record.result or {}
    assert (found["num_steps"], found["best_step"]) == (8, None)
    assert found["evaluation"]["step"] == 8
    last = tmp_path / "run" / "checkpoints" / "checkpoint-8"
    assert same_weights(tmp_path / "run", last)


def test_killed_between_the_last_checkpoint_and_the_result(
    run: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student_config(tiny_cache, tmp_path / "run", unlabeled_alpha=0.3, conf_power=1.0)

    def killed(*_: object, **__: object) -> None:
        raise Interruption

    with monkeypatch.context() as patched:
        patched.setattr(train_student, "_saved", killed)
        with pytest.raises(Interruption):
            train_student.run(config)
    watcher = Watcher()
    train_student.run(config, watcher)
    assert watcher.steps == []
    assert same_weights(tmp_path / "run", run)
    assert log_of(tmp_path / "run") == log_of(run)


def test_accumulation_over_both_kinds(tiny_cache: Path, tmp_path: Path) -> None:
    settings = {"unlabeled_alpha": 0.3, "gradient_accumulation": 2}
    train_student.run(student_config(tiny_cache, tmp_path / "run", **settings))
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 6
    assert all("ce" in line and "kd_unlabeled" in line for line in lines)


def test_an_epoch_sees_every_labelled_sample(tiny_cache: Path, tmp_path: Path) -> None:
    num_training = int((~held_out(CacheReader(tiny_cache).sample_ids(), 0.2)).sum())
    given = {"max_steps": None, "epochs": 2, "checkpoint_steps": None, "batch_size": 16}
    watcher = Watcher()
    train_student.run(student_config(tiny_cache, tmp_path / "run", **given), watcher)
    per_epoch = -(-num_training // 16)
    assert watcher.started[0][1] == len(watcher.steps) == 2 * per_epoch
    evaluated = [line["step"] for line in log_of(tmp_path / "run") if "eval_accuracy" in line]
    assert evaluated == [per_epoch, 2 * per_epoch]


def test_nothing_held_out(tiny_cache: Path, tmp_path: Path) -> None:
    settings = {"eval_fraction": 0.0, "max_steps": 2}
    result = train_student.run(student_config(tiny_cache, tmp_path / "run", **settings))
    assert (result.record.result or {})["evaluation"] is None
    with pytest.raises(UserError, match=r"--early-stopping needs an evaluation.*--eval-fraction"):
        train_student.run(
            student_config(tiny_cache, tmp_path / "other", early_stopping=1, **settings)
        )


def test_a_mismatch_stops_before_anything_is_written(
    tiny_cache: Path, tmp_path: Path, tiny_gpt2: Path
) -> None:
    config = student_config(tiny_cache, tmp_path / "run", student_tokenizer=str(tiny_gpt2))
    watcher = Watcher()
    with pytest.raises(TokenizationMismatch):
        train_student.run(config, watcher)
    assert not watcher.joined
    assert not (tmp_path / "run").exists()


def test_no_cache(tmp_path: Path, tiny_cache: Path) -> None:
    config = student_config(tiny_cache, tmp_path / "run").model_copy(update={"cache": None})
    with pytest.raises(UserError, match="--cache DIR"):
        train_student.run(config)


def test_the_settings_are_recorded_without_paths(run: Path, tiny_cache: Path) -> None:
    text = json.dumps(read_run(run).settings)
    assert str(tiny_cache) not in text and str(run) not in text
    settings = read_run(run).settings
    assert settings["cache_fingerprint"] == CacheReader(tiny_cache).manifest.fingerprint
    assert (settings["dtype"], settings["conf_power"]) == ("float32", 1.0)


def test_a_cache_that_grew_is_not_the_one_that_was_trained_on(
    tmp_path: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    small = CacheTeacherConfig.of(
        name="tiny",
        teacher=str(tiny_bert),
        device="cpu",
        max_length=MAX_LENGTH,
        labeled=CorpusConfig(source=str(acl_imdb), split="train", max_samples=40),
        out=tmp_path / "cache",
    )
    cache = cache_teacher.run(small).cache
    train_student.run(student_config(cache, tmp_path / "run"))
    more = small.labeled.model_copy(update={"max_samples": 60})
    cache_teacher.run(small.model_copy(update={"labeled": more}))
    with pytest.raises(UserError, match=r"cache_samples\.labeled is 40 there and 60 in this"):
        train_student.run(student_config(cache, tmp_path / "run"))


def test_two_trainings_never_share_a_folder(tmp_path: Path, tiny_cache: Path) -> None:
    with (
        writer_lock(tmp_path / "run"),
        pytest.raises(UserError, match="being written by another process"),
    ):
        train_student.run(student_config(tiny_cache, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()
    assert train_student.run(student_config(tiny_cache, tmp_path / "run")).record.complete
