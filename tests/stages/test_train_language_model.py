"""Stage two on a language model's cache: from the shards to a folder that generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

import teacher_cache.stages.student  # noqa: F401  (registers the student)
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.stages import train_student
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.train_student import StageTwoObserver
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.tiny_language_models import tiny_teacher, write_cache
from tests.tiny_runs import result_files, result_log, student_config

pytestmark = pytest.mark.usefixtures("tokenizers_read_once")

TEXTS = [
    f"{person} had been {feeling} by the {thing}, and said so. {person} went home."
    for person in ("Emma", "Mr. Knightley", "Harriet")
    for feeling, thing in (("vexed", "rain"), ("charmed", "ball"), ("tired", "visit"))
]


class Interruption(Exception):
    """Stands for a kill: nothing in the code under test catches it."""


class DiesAt(StageTwoObserver, TrainerCallback):
    """Interrupts a training at a step's end."""

    def __init__(self, step: int):
        self._step = step

    def callbacks(self) -> list[TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise Interruption


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """The four most probable of 50,257 ids at each position of nine short texts."""
    folder = tmp_path_factory.mktemp("caches") / "lm"
    num_ids = len(gpt2_tokenizer)
    codec = TopKCodec(support_size=num_ids, top_k=4)
    return write_cache(folder, codec, gpt2_tokenizer, TEXTS, tiny_teacher(num_ids))


def config(cache: Path, run: Path, **changes: Any) -> TrainStudentConfig:
    settings: dict[str, Any] = {"batch_size": 2, "eval_fraction": 0.4, "lr": 0.02}
    return student_config(cache, run, **(settings | changes))


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    return train_student.run(config(cache, out, gradient_accumulation=2, conf_power=1.0)).run


def test_comes_closer_to_the_teacher(run: Path) -> None:
    evaluations = [line for line in result_log(run) if "eval_kl" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert evaluations[-1]["eval_kl"] < evaluations[0]["eval_kl"]
    lines = [line for line in result_log(run) if "loss" in line]
    assert all({"ce", "kd", "agreement", "conf_w"} <= line.keys() for line in lines)
    record = read_run(run)
    assert record.settings["task"] == "lm"
    assert not {"pooling", "head", "dropout"} & record.settings.keys()


def test_the_folder_generates(run: Path, gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(run)
    assert model.config.eos_token_id == gpt2_tokenizer.eos_token_id
    assert torch.equal(model.lm_head.weight, model.backbone.embedding.weight)
    ids = torch.tensor([gpt2_tokenizer("Emma had been")["input_ids"]])
    mask = torch.ones_like(ids)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for length in range(ids.shape[1], found.shape[1]):
            logits = model(input_ids=found[:, :length]).logits[0, -1]
            assert int(logits.argmax()) == int(found[0, length])


def test_its_tokenizer_cuts_no_text_of_a_model_without_positions(run: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(run)("so " * 3000)["input_ids"]) >= 3000


def test_is_no_classifier(run: Path) -> None:
    """Which transformers would make of it, with a head at random."""
    with pytest.raises(UserError, match="is a language model: give a classifier's run"):
        Classifier.of_run(run, DeviceConfig(device="cpu"))


def test_goes_on_bit_for_bit_after_a_kill(run: Path, cache: Path, tmp_path: Path) -> None:
    killed = config(cache, tmp_path / "student", gradient_accumulation=2, conf_power=1.0)
    for step in (3, 5):
        with pytest.raises(Interruption):
            train_student.run(killed, DiesAt(step))
    assert result_files(train_student.run(killed).run) == result_files(run)


def test_stops_early_and_keeps_the_best(cache: Path, tmp_path: Path) -> None:
    """At a rate that ruins it: the first evaluation stays the best."""
    ruinous = config(
        cache, tmp_path / "student", lr=3.0, warmup=0.0, schedule="constant_with_warmup",
        early_stopping=1, max_steps=20,
    )  # fmt: skip
    run = train_student.run(ruinous).run
    losses = {x["step"]: x["eval_loss"] for x in result_log(run) if "eval_loss" in x}
    result = read_run(run).result or {}
    assert result["num_steps"] == max(losses) < 20
    assert result["best_step"] == min(losses, key=losses.__getitem__) < max(losses)
    assert result["evaluation"]["eval_loss"] == min(losses.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "mean", "dropout": 0.2}, "--pooling is of classifiers' training"),
        ({"bidirectional": True}, "--bidirectional"),
        ({"lm_weight": 0.1}, "--lm-weight"),
        ({"pooled_weight": 0.1}, "--pooled-weight"),
        ({"embeddings": "teacher-states"}, "--embeddings teacher-states"),
        ({"embeddings": "teacher"}, "was made without"),
        ({"temperature": 5.0}, r"temperature 5 is outside the grid of the cache \(1,1.5,2,3,4\)"),
        ({"unlabeled_alpha": 0.3}, "needs unlabelled text"),
    ],
)
def test_refuses_what_it_does_not_do(
    cache: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train_student.run(config(cache, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_refuses_a_support_that_is_not_the_tokenizers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_manifest(cache).settings["support"]
    assert settings["kind"] == "teacher"
    monkeypatch.setattr(Support, "settings", settings | {"kind": "aligned"})
    with pytest.raises(UserError, match="which are not the ids of its tokenizer"):
        train_student.run(config(cache, tmp_path / "run"))
