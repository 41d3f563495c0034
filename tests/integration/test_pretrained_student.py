"""`--arch hf:ID`: pre-trained students through the command line, from the cache to the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, FNetConfig, TrainerCallback, pipeline

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student
from teacher_cache.stages.evaluation.config import EvaluateOptions
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.train_student import StageTwoObserver
from teacher_cache.stages.training.config import ArchitectureConfig, TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import done, pipe, refused
from tests.tiny_models import write_tiny_bert

QUICK = (
    "--device", "cpu", "--batch-size", "8", "--max-steps", "6", "--checkpoint-steps", "2",
    "--lr", "5e-4", "--eval-fraction", "0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: Any) -> Path:
    """A pre-trained BERT of other weights than the teacher's, with dropout."""
    return write_tiny_bert(tmp_path_factory.mktemp("start") / "bert", bert_tokenizer, seed=7)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bert_cache: Path, start: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    printed = done(*command(bert_cache, start, folder))
    assert "✓ tokenization verified" in printed
    return folder


def command(cache: Path, start: Path, out: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return ("train-student", "--cache", cache, "--out", out, "--arch", f"hf:{start}", *QUICK, *more)


def test_the_run_says_what_it_started_from(run: Path, start: Path) -> None:
    record = read_run(run)
    assert record.complete and record.about["tokenization"] == "verified"
    assert record.about["start"] == f"hf:{start}"
    assert record.settings["arch"] == "hf"
    found = record.settings["start"]
    assert (found["architecture"], found["commit"]) == ("BertForSequenceClassification", None)
    assert len(found["weights_sha256"]) == len(found["config_sha256"]) == 64
    # What only shapes a Mamba does not pretend to have had a part.
    assert not set(ArchitectureConfig.model_fields) - {"arch"} & record.settings.keys()
    assert str(start) not in json.dumps(record.settings)


def test_the_folder_works_as_every_student(run: Path, bert_cache: Path, acl_imdb: Path) -> None:
    assert done("predict", run, "A fine film.").split("\t")[0] in ("neg", "pos")
    printed = done(
        "evaluate", run, "--data", acl_imdb, "--latency-lengths", "8,4096", "--device", "cpu"
    )
    assert "pretrained" in printed and "teacher" in printed
    done("check", "--cache", bert_cache, "--student-tokenizer", run)
    classify: Any = pipeline("text-classification", model=str(run), device="cpu")
    (found,) = classify("A fine film.")
    assert found["label"] in ("neg", "pos") and 0.5 <= found["score"] <= 1


def test_one_that_minds_its_neighbours_is_trained_without_them(
    tmp_path: Path, bert_cache: Path, bert_tokenizer: Any
) -> None:
    start, out = tmp_path / "fnet", tmp_path / "run"
    FNetConfig(
        vocab_size=len(bert_tokenizer),
        pad_token_id=bert_tokenizer.pad_token_id,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
    ).save_pretrained(start)
    bert_tokenizer.save_pretrained(start)
    outcome = pipe(*command(bert_cache, start, out))
    assert outcome.code == 0, outcome.stderr
    said = " ".join(outcome.stderr.split())
    assert "reads a text otherwise beside longer ones: only documents of equal length" in said
    record = read_run(out)
    assert record.complete and record.settings["batching"] == {"rows": "equal", "borders": []}


def test_training_moved_it_from_where_it_started(run: Path, start: Path) -> None:
    student = Classifier.of_run(run, EvaluateOptions(device="cpu"))
    assert student.model.config.architectures == ["BertForSequenceClassification"]
    before, after = (load_file(one / "model.safetensors") for one in (start, run))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved
    assert "bert.embeddings.word_embeddings.weight" in moved
    lines = (read_run(run).result or {})["log"]
    assert [line["step"] for line in lines if "eval_kl" in line] == [2, 4, 6]


def test_a_changed_start_is_refused(
    run: Path, bert_cache: Path, start: Path, tmp_path: Path, bert_tokenizer: Any
) -> None:
    assert "was trained before" in done(*command(bert_cache, start, run))
    moved = shutil.copytree(start, tmp_path / "moved")
    assert "was trained before" in done(*command(bert_cache, moved, run))
    other = write_tiny_bert(tmp_path / "other", bert_tokenizer, seed=8)
    refused(
        *command(bert_cache, other, run),
        saying=r"start\.weights_sha256 is '\w+' there and '\w+' in this.*--resume never",
    )
    mamba = ("train-student", "--cache", bert_cache, "--out", run, *QUICK)
    refused(*mamba, saying="arch is 'hf' there and 'mamba2' in this command")


class Interruption(Exception):
    """Stands for a kill: nothing in the code under test catches it."""


class Interrupter(StageTwoObserver, TrainerCallback):
    """Interrupts between the first checkpoint and the second."""

    def callbacks(self) -> list[TrainerCallback]:
        return [self]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Interruption


class Starts(StageTwoObserver):
    """Notes whether the training went on from a checkpoint."""

    resumed = False

    def on_start(self, run: Path, num_steps: int, checkpoint: Path | None) -> None:
        self.resumed = checkpoint is not None


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt2"])
def test_an_interrupted_run_ends_with_the_same_bits(
    kind: str,
    request: pytest.FixtureRequest,
    bert_cache: Path,
    start: Path,
    tmp_path: Path,
) -> None:
    if kind == "tiny_gpt2":  # a decoder without a tokenizer, so that the cache's is its own
        start = shutil.copytree(request.getfixturevalue(kind), tmp_path / "gpt2")
        for path in start.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()
    config = TrainStudentConfig.of(
        cache=bert_cache,
        arch=f"hf:{start}",
        device="cpu",
        batch_size=8,
        max_steps=4,
        checkpoint_steps=2,
        unlabeled_alpha=0.3,
    )
    for name in ("whole", "killed"):
        own = config.model_copy(update={"out": tmp_path / name})
        if name == "killed":
            with pytest.raises(Interruption):
                train_student.run(own, Interrupter())
            assert not read_run(tmp_path / name).complete
        watcher = Starts()
        assert not train_student.run(own, watcher).was_complete
        assert watcher.resumed == (name == "killed")
    whole, killed = (tmp_path / one / "model.safetensors" for one in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_another_tokenizer_stops_the_run_with_the_ways_out(
    bert_cache: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    printed = refused(
        *command(bert_cache, tiny_gpt2, tmp_path / "run"),
        code=1,
        saying="after --arch hf: name a model of that tokenizer",
    )
    assert "id-to-string table" in printed
    assert not (tmp_path / "run").exists()
    file = tmp_path / "check.yaml"
    file.write_text(yaml.safe_dump({"train_student": {"arch": f"hf:{tiny_gpt2}"}}))
    refused("check", "--cache", bert_cache, "--config", file, code=1, saying="id-to-string table")


def test_a_named_tokenizer_is_compared_instead(
    bert_cache: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    # A GPT-2 that reads BERT's ids: its embeddings mean other tokens, and the user said so.
    named = ("--student-tokenizer", bert_cache / "teacher", "--max-steps", "1")
    run = tmp_path / "run"
    done(*command(bert_cache, tiny_gpt2, run, *named))
    assert json.loads((run / "config.json").read_text())["pad_token_id"] == 0
    assert read_run(run).about["tokenization"] == "verified"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--d-model", "16"), "--d-model"),
        (("--bidirectional",), "--bidirectional"),
        (("--pooling", "cls", "--dropout", "0.1"), "--dropout, --pooling"),  # their defaults
        (("--set", "head=mlp", "--num-layers", "2"), "--head, --num-layers"),
        (("--expand", "2", "--d-state", "8", "--head-dim", "8"), "--d-state, --expand, --head-dim"),
    ],
)
def test_options_of_a_mamba_are_refused(
    options: tuple[str, ...], named: str, bert_cache: Path, start: Path, tmp_path: Path
) -> None:
    refused(
        *command(bert_cache, start, tmp_path / "run", *options),
        saying=f"only a Mamba student takes {named}, and --arch hf:.* leave out what it does not",
    )
    assert not (tmp_path / "run").exists()


def test_samples_that_are_too_long_are_refused(bert_cache: Path, tmp_path: Path) -> None:
    both = (CacheReader(bert_cache, split).lengths() for split in ("labeled", "unlabeled"))
    longest = max(int(lengths.max()) for lengths in both)
    unlabeled = ("--unlabeled-alpha", "0.3")
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for positions, saying in (
        (longest - 1, f"reads {longest - 1} tokens, and the longest cached sample has {longest}"),
        (longest, f"would get new texts of up to 512: give --max-length {longest}"),
    ):
        folder = tmp_path / str(positions)
        BertConfig(
            vocab_size=30522, intermediate_size=8, max_position_embeddings=positions, **sizes
        ).save_pretrained(folder)
        refused(*command(bert_cache, folder, tmp_path / "run", *unlabeled), saying=saying)
        assert not (tmp_path / "run").exists()
    shorter = ("--max-length", str(longest), "--max-steps", "1", *unlabeled)
    outcome = pipe(*command(bert_cache, tmp_path / str(longest), tmp_path / "run", *shorter))
    assert outcome.code == 0, outcome.stderr
    assert "has no weights: all start fresh, from the seed" in outcome.stderr
    assert "has no tokenizer of its own here: it gets the cache's" in outcome.stderr


def test_a_whole_run_with_both_kinds_of_student(
    acl_imdb: Path, tiny_bert: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mamba = {"d_model": 16, "num_layers": 1, "head_dim": 48}
    content = {
        "cache_teacher": {"data": str(acl_imdb), "teacher": str(tiny_bert), "max_samples": 60},
        "train_student": {"batch_size": 16, "max_steps": 1},
        "students": {"mamba": mamba, "bert": {"arch": f"hf:{start}"}},
        "evaluate": {"data": str(acl_imdb), "latency_lengths": [8]},
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    for setting, saying in (
        ("students.bert.arch=hf:./nowhere", r"--arch hf:\./nowhere is no folder"),
        ("train_student.d_model=16", "students.bert: only a Mamba student takes --d-model"),
    ):
        refused("run", "--config", "run.yaml", "--set", setting, saying=saying)
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    printed = done("run", "--config", "run.yaml")
    for name in ("teacher", "mamba", "bert"):
        assert f"│ {name} " in printed
