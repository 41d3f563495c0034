from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages import finetune_teacher
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import load_teacher
from teacher_cache.stages.training.run_folder import read_run
from teacher_cache.stages.training.task import TrainingObserver
from tests.tiny_runs import read_tokenizers_once

CLOCK = ("runtime", "per_second")


class Interruption(Exception):
    """Stands for a kill: nothing in the code under test catches it."""


class Watcher(TrainingObserver, TrainerCallback):
    """Writes down the steps; interrupts after a checkpoint."""

    def __init__(self, *, after_save: int | None = None):
        self.steps: list[int] = []
        self._after_save = after_save

    def callbacks(self) -> list[TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._after_save:
            raise Interruption


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leaves out what takes longer than a tiny training: tokenizers, old garbage at its start."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        read_tokenizers_once(partial(patched.setattr, finetune_teacher, raising=False))
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny BERT without a head, with dropout, that reads 64 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    return write_base(folder, bert_tokenizer)


def write_base(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        **changes,
    )
    model = BertForSequenceClassification(config) if changes else BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(base: Path, data: Path, out: Path, **changes: Any) -> FinetuneTeacherConfig:
    given: dict[str, Any] = {
        "name": "tiny",
        "model": str(base),
        "labeled": CorpusConfig(source=str(data), split="train"),
        "out": out,
        "device": "cpu",
        "max_length": 24,
        "batch_size": 8,
        "max_steps": 6,
        "checkpoint_steps": 2,
        "log_steps": 1,
        "lr": 0.01,
        "eval_fraction": 0.2,
    }
    return FinetuneTeacherConfig.of(**(given | changes))


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def log_of(teacher: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    lines = (read_run(teacher).result or {})["log"]
    return [
        {name: value for name, value in line.items() if not name.endswith(CLOCK)}
        for line in lines
        if "train_runtime" not in line
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, base: Path, acl_imdb: Path) -> Path:
    """A base that was fine-tuned to its end."""
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    return finetune_teacher.run(config(base, acl_imdb, out)).teacher


def test_a_base_becomes_a_teacher(teacher: Path) -> None:
    loaded = load_teacher(TeacherConfig(teacher=str(teacher), device="cpu"))
    assert loaded.id2label == {0: "neg", 1: "pos"}
    assert loaded.max_length(None) == 64
    record = read_run(teacher)
    assert record.complete
    assert {"loss", "grad_norm", "learning_rate"} <= log_of(teacher)[0].keys()


# Accuracies of the evaluations, whatever the teacher says: the best is the second.
ACCURACIES = (0.5, 0.7, 0.6, 0.7, 0.65)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation's accuracy by its place in the training, resumed or not."""
    evaluate = finetune_teacher.LabelTrainer.evaluate

    def scripted_evaluate(trainer: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        accuracy = ACCURACIES[trainer.state.global_step // 2 - 1]
        trainer.compute_metrics = lambda _: {"accuracy": accuracy}
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(finetune_teacher.LabelTrainer, "evaluate", scripted_evaluate)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("killed_at", [None, 2, 4, 8])
def test_the_best_of_its_evaluations_is_kept(
    base: Path, acl_imdb: Path, tmp_path: Path, killed_at: int | None
) -> None:
    asked = config(base, acl_imdb, tmp_path / "teacher", max_steps=10)
    if killed_at:
        with pytest.raises(Interruption):
            finetune_teacher.run(asked, Watcher(after_save=killed_at))
    result = finetune_teacher.run(asked)
    found = result.record.result or {}
    assert (found["num_steps"], found["best_step"]) == (10, 4)
    assert (found["evaluation"]["step"], found["evaluation"]["eval_accuracy"]) == (4, 0.7)
    kept = sorted(path.name for path in (tmp_path / "teacher" / "checkpoints").iterdir())
    assert kept == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert same_weights(tmp_path / "teacher", tmp_path / "teacher" / "checkpoints" / "checkpoint-4")


def test_an_interrupted_fine_tuning_goes_on(
    teacher: Path, base: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    asked = config(base, acl_imdb, tmp_path / "teacher")
    with pytest.raises(Interruption):
        finetune_teacher.run(asked, Watcher(after_save=2))
    watcher = Watcher()
    finetune_teacher.run(asked, watcher)
    assert watcher.steps == [3, 4, 5, 6]
    assert same_weights(tmp_path / "teacher", teacher)
    assert log_of(tmp_path / "teacher") == log_of(teacher)


def test_a_named_checkpoint(teacher: Path, base: Path, acl_imdb: Path, tmp_path: Path) -> None:
    asked = config(base, acl_imdb, tmp_path / "teacher")
    with pytest.raises(Interruption):
        finetune_teacher.run(asked, Watcher(after_save=4))
    older = tmp_path / "teacher" / "checkpoints" / "checkpoint-2"
    watcher = Watcher()
    finetune_teacher.run(asked.model_copy(update={"resume": str(older)}), watcher)
    assert watcher.steps == [3, 4, 5, 6]
    assert same_weights(tmp_path / "teacher", teacher)


def test_resume_never_starts_again(
    teacher: Path, base: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interruption):
        finetune_teacher.run(
            config(base, acl_imdb, tmp_path / "teacher", seed=5), Watcher(after_save=2)
        )
    watcher = Watcher()
    finetune_teacher.run(config(base, acl_imdb, tmp_path / "teacher", resume="never"), watcher)
    assert watcher.steps == [1, 2, 3, 4, 5, 6]
    assert same_weights(tmp_path / "teacher", teacher)


def test_a_complete_one_is_left_alone(teacher: Path, base: Path, acl_imdb: Path) -> None:
    watcher = Watcher()
    result = finetune_teacher.run(config(base, acl_imdb, teacher), watcher)
    assert result.was_complete
    assert not watcher.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr is 0\.01 there and 0\.5 in this command"),
        ({"max_length": 16}, "max_length is 24 there and 16"),
        ({"labeled": {"split": "test"}}, "data.train"),
        ({"labeled": {"max_samples": 50}}, "data.num_documents is 120 there and 50"),
        ({"model": "another"}, "model_sha256"),
    ],
)
def test_other_settings_are_refused(
    teacher: Path,
    base: Path,
    acl_imdb: Path,
    tmp_path: Path,
    bert_tokenizer: PreTrainedTokenizerBase,
    changes: dict[str, Any],
    message: str,
) -> None:
    asked = config(base, acl_imdb, teacher)
    if "model" in changes:
        changes = {"model": str(write_base(tmp_path, bert_tokenizer))}
    if "labeled" in changes:
        changes = {"labeled": asked.labeled.model_copy(update=changes["labeled"])}
    with pytest.raises(UserError, match=f"{message}.*--resume never"):
        finetune_teacher.run(asked.model_copy(update=changes))


def test_another_corpus_to_evaluate_on(base: Path, acl_imdb: Path, tmp_path: Path) -> None:
    validation = CorpusConfig(source=str(acl_imdb), split="test")
    asked = config(base, acl_imdb, tmp_path / "teacher", max_steps=2, validation=validation)
    finetune_teacher.run(asked)
    data = read_run(tmp_path / "teacher").settings["data"]
    assert data["num_documents"] == 120
    assert data["validation"]["split"] == "test"


def test_nothing_to_evaluate_on(base: Path, acl_imdb: Path, tmp_path: Path) -> None:
    asked = config(base, acl_imdb, tmp_path / "teacher", eval_fraction=0.0, max_steps=4)
    result = finetune_teacher.run(asked)
    assert (result.record.result or {})["evaluation"] is None
    last = tmp_path / "teacher" / "checkpoints" / "checkpoint-4"
    assert same_weights(tmp_path / "teacher", last)


def test_a_head_of_other_classes_gives_way(
    acl_imdb: Path, tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    base = write_base(tmp_path / "base", bert_tokenizer, num_labels=5)
    finetune_teacher.run(config(base, acl_imdb, tmp_path / "teacher", max_steps=1))
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    before, after = (load_file(one / "model.safetensors") for one in (base, tmp_path / "teacher"))
    assert after["classifier.weight"].shape == (2, 16)
    name = "bert.encoder.layer.0.output.dense.weight"
    # The rest is what it was, a step of warm-up aside.
    assert torch.allclose(before[name], after[name], atol=0.02)


def test_the_longest_sample_is_what_the_base_reads(
    base: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    finetune_teacher.run(config(base, acl_imdb, tmp_path / "it", max_length=None, max_steps=1))
    assert read_run(tmp_path / "it").settings["max_length"] == 64
    with pytest.raises(UserError, match=r"--max-length 65 is more than .* reads \(64 tokens\)"):
        finetune_teacher.run(config(base, acl_imdb, tmp_path / "other", max_length=65))
    assert not (tmp_path / "other").exists()


def test_a_decoder_becomes_a_teacher(acl_imdb: Path, tmp_path: Path, tiny_gpt2: Path) -> None:
    finetune_teacher.run(config(tiny_gpt2, acl_imdb, tmp_path / "teacher", max_steps=1))
    loaded = load_teacher(TeacherConfig(teacher=str(tmp_path / "teacher"), device="cpu"))
    assert loaded.model.config.pad_token_id == loaded.pad_id == loaded.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (["a joy,pos"] * 20, {}, "all 20 documents have the label 'pos'"),
        ([",pos", ",neg"] * 9, {}, r"of the 18 documents of .*, 0 are left.*of the classes \[\]"),
        (["a joy,pos", *[",neg"] * 9], {"eval_fraction": 0}, r"1 are left .* classes \[1\]"),
    ],
)
def test_what_cannot_be_learned_from(
    base: Path, tmp_path: Path, rows: list[str], changes: dict[str, Any], message: str
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    labeled = CorpusConfig(source=str(data), label_names=("neg", "pos"))
    with pytest.raises(UserError, match=message):
        finetune_teacher.run(config(base, data, tmp_path / "teacher", labeled=labeled, **changes))


def test_a_base_that_is_not_there(acl_imdb: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model \S+/missing is no folder"):
        finetune_teacher.run(config(tmp_path / "missing", acl_imdb, tmp_path / "teacher"))
