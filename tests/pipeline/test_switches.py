"""Each switch of `pipe train-student` changes what it says and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.pipeline import commands
from teacher_cache.stages import train_student
from teacher_cache.stages.join.config import JoinConfig, ProjectionConfig
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.losses.config import ObjectiveConfig, TransferConfig
from teacher_cache.stages.student import MambaStudentForSequenceClassification
from teacher_cache.stages.training.arguments import checkpoint_to_resume
from teacher_cache.stages.training.config import NOT_RESULTS, OptimizationConfig, TrainStudentConfig
from tests.command_line import pipe, refused
from tests.tiny_runs import student_config


@pytest.fixture(scope="module", autouse=True)
def join_once() -> Iterator[None]:
    """Compare each pair of tokenizations once; it is half a second, and tested elsewhere."""
    join, known = train_student.join, {}

    def remembered(cache: Path, config: JoinConfig, *, longest_sample: int) -> Joined:
        settings = (config.student_tokenizer, config.max_length, config.on_mismatch)
        if settings not in known:
            known[settings] = join(cache, config, longest_sample=longest_sample)
        return known[settings]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_student, "join", remembered)
        yield


class Resolved(Exception):
    """Training would start now, with these."""

    def __init__(self, **parts: Any):
        super().__init__()
        self.parts = parts


def resolved(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    run: Path,
    *switches: str | Path,
    without: str = "",
) -> dict[str, Any]:
    """All that decides a training, flat, as the command line resolves it; nothing is trained."""

    def stop(**parts: Any) -> None:
        raise Resolved(**parts)

    def remember(config: OptimizationConfig, folder: Path) -> Path | None:
        resumed.append(str(config.resume))
        return checkpoint_to_resume(config, folder)

    resumed: list[str] = []
    monkeypatch.setattr(train_student, "StudentTrainer", stop)
    monkeypatch.setattr(train_student, "checkpoint_to_resume", remember)
    monkeypatch.setattr(commands.TrainingProgress, "callbacks", lambda self: [])
    base = student_config(cache, run).model_dump(mode="json", exclude_unset=True)
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in base.items() if name != without
    ]
    with pytest.raises(Resolved) as raised:
        pipe("train-student", *flags, *switches)
    parts = raised.value.parts
    trained: Any = parts["model"]
    is_projected = hasattr(trained, "auxiliaries")
    student: MambaStudentForSequenceClassification = trained.student if is_projected else trained
    weights = hashlib.sha256()
    for name, tensor in student.state_dict().items():
        weights.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    batches, evaluation = parts["batches"], parts["eval_dataset"]
    found = {"model.weights": weights.hexdigest(), "resume": resumed}
    found["projection"] = tuple(trained.projection.weight.shape) if is_projected else None
    found["embedding_lr_scale"] = parts["embedding_lr_scale"]
    found |= {f"model.{name}": value for name, value in student.config.to_dict().items()}
    found |= {f"trainer.{name}": value for name, value in parts["args"].to_dict().items()}
    found |= {
        f"objective.{name}": getattr(parts["lesson"].objective, name)
        for name in ObjectiveConfig.model_fields
    }
    found["batches.num"] = len(batches)
    found["batches.order"] = list(islice(batches, 6))
    found["held out"] = len(evaluation) if evaluation is not None else 0
    found["callbacks"] = [type(one).__name__ for one in parts["callbacks"]]
    folder = Path(parts["args"].output_dir).parent
    record = json.loads((folder / "run.json").read_text())
    found |= {f"settings.{name}": value for name, value in record["settings"].items()}
    found |= {f"about.{name}": value for name, value in record["about"].items()}
    return found


# Switch -> its value, empty for one that is on or off, and what it changes besides its own entry
# in the run's settings.
SWITCHES: dict[str, tuple[str, set[str]]] = {
    # The objective.
    "alpha": ("0.9", {"objective.alpha"}),
    "temperature": ("4", {"objective.temperature"}),
    "divergence": ("jsd", {"objective.divergence"}),
    "conf_power": ("1", {"objective.conf_power"}),
    "label_smoothing": ("0.1", {"objective.label_smoothing"}),
    "unlabeled_alpha": (
        "0.3",
        {"objective.unlabeled_alpha", "batches.order", "settings.cache_samples"},
    ),
    "lm_weight": ("0.5", {"objective.lm_weight"}),
    "pooled_weight": ("0.5", {"objective.pooled_weight", "projection"}),
    "unlabeled_ratio": ("2", set()),  # of no unlabelled batches; see below
    # The student's shape.
    "d_model": ("16", {"model.d_model", "model.weights"}),
    "num_layers": ("2", {"model.num_layers", "model.weights"}),
    "expand": ("3", {"model.expand", "model.weights"}),
    "d_state": ("8", {"model.d_state", "model.weights"}),
    "head_dim": ("4", {"model.head_dim", "model.weights"}),
    "pooling": ("mean", {"model.pooling", "model.position_map"}),
    "head": ("linear", {"model.head", "model.weights"}),
    "dropout": ("0.2", {"model.dropout"}),
    "bidirectional": ("", {"model.bidirectional", "model.weights"}),
    "embeddings": ("teacher", {"model.weights", "settings.teacher_embeddings_sha256"}),
    "embedding_lr_scale": ("0.1", {"embedding_lr_scale"}),
    # The join.
    "on_mismatch": ("warn", set()),
    # The training.
    "max_steps": ("12", {"trainer.max_steps", "trainer.warmup_steps", "batches.num"}),
    "batch_size": (
        "4",
        {"trainer.per_device_train_batch_size", "trainer.per_device_eval_batch_size"}
        | {"batches.order"},
    ),
    "gradient_accumulation": ("2", {"trainer.gradient_accumulation_steps", "batches.num"}),
    "lr": ("0.01", {"trainer.learning_rate"}),
    "weight_decay": ("0.1", {"trainer.weight_decay"}),
    "warmup": ("0.5", {"trainer.warmup_steps"}),
    "schedule": ("linear", {"trainer.lr_scheduler_type"}),
    "eval_fraction": ("0.4", {"held out", "batches.order"}),
    "checkpoint_steps": ("3", {"trainer.eval_steps", "trainer.save_steps"}),
    "log_steps": ("2", {"trainer.logging_steps"}),
    "seed": ("1", {"trainer.seed", "model.weights", "batches.order"}),
    "early_stopping": (
        "2",
        {"callbacks", "trainer.load_best_model_at_end"}
        | {"trainer.metric_for_best_model", "trainer.greater_is_better"},
    ),
    "resume": ("never", {"resume"}),
    "dtype": ("bfloat16", {"trainer.bf16"}),
}
# Tested apart (here or among the wrong inputs): they name files and devices, or have one value.
APART = {"cache", "out", "student_tokenizer", "max_length", "epochs", "device", "report_to", "arch"}
APART |= {"jsd_beta", "skew_alpha"}  # of their divergences, and the base has neither
APART |= {"align", *ProjectionConfig.model_fields}  # of language models, in test_train_aligned
APART |= {"d_intermediate", "layers", "init", "teacher_folder"}  # in test_copied_teacher
APART |= {"unlabeled_from"}  # of the unlabelled samples, which take no part in the base
# They need a cache of maps and states: tests/stages/training/transfer/test_training.py.
APART |= set(TransferConfig.model_fields)


def test_every_switch_is_tested() -> None:
    assert set(SWITCHES) | APART == set(TrainStudentConfig.options())
    assert not set(SWITCHES) & APART


@pytest.fixture(scope="module")
def base(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return resolved(monkeypatch, tiny_cache, tmp_path_factory.mktemp("base") / "run")


def changed(base: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names of what differs, but for the folder that every run has of its own."""
    assert base.keys() == other.keys()
    names = {name for name in base if base[name] != other[name]}
    return names - {"trainer.output_dir", "trainer.logging_dir"}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_what_it_says_and_nothing_else(
    name: str,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: dict[str, Any],
) -> None:
    value, expected = SWITCHES[name]
    flag = f"--{name.replace('_', '-')}" + (f"={value}" if value else "")
    other = resolved(monkeypatch, tiny_cache, tmp_path / "run", flag)
    own = set() if name in NOT_RESULTS else {f"settings.{name}"}
    assert changed(base, other) == expected | own


def test_a_student_that_has_read_the_next_token_does_not_predict_it(tiny_cache: Path) -> None:
    flags = ("train-student", "--cache", tiny_cache, "--lm-weight", "0.5")
    refused(*flags, "--bidirectional", saying="--lm-weight .* with --bidirectional it has read it")


def test_a_part_of_the_unlabelled_samples(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache has no views, so its corpus is all there is.
    flags = ("--unlabeled-alpha", "0.3")
    both = resolved(monkeypatch, tiny_cache, tmp_path / "all", *flags)
    own = resolved(monkeypatch, tiny_cache, tmp_path / "own", *flags, "--unlabeled-from", "corpus")
    assert changed(both, own) == {"settings.unlabeled_from"}
    flags = ("train-student", "--cache", tiny_cache, "--unlabeled-from", "views")
    refused(*flags, saying="chooses among unlabelled samples, .* while --unlabeled-alpha is 0")
    saying = "--unlabeled-from views needs views in the cache, .* only unlabeled: make a cache with"
    refused(*flags, "--unlabeled-alpha", "0.3", saying=saying)


@pytest.mark.parametrize(
    ("name", "chosen", "value"), [("jsd_beta", "jsd", "0.9"), ("skew_alpha", "skew-kl", "0.3")]
)
def test_a_parameter_of_a_divergence(
    name: str,
    chosen: str,
    value: str,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, own = ("--divergence", chosen), (f"--{name.replace('_', '-')}", value)
    one = resolved(monkeypatch, tiny_cache, tmp_path / "one", *flags)
    two = resolved(monkeypatch, tiny_cache, tmp_path / "two", *flags, *own)
    assert changed(one, two) == {f"objective.{name}", f"settings.{name}"}
    saying = f"{' '.join(own)} is of --divergence {chosen}, and the divergence is kl"
    refused("train-student", "--cache", tiny_cache, *own, saying=saying)


@pytest.mark.parametrize("flag", ["--lm-weight=0.5", "--embeddings=teacher", "--pooled-weight=1"])
def test_options_of_a_mamba_are_refused_for_another_student(flag: str, tiny_cache: Path) -> None:
    refused(
        *("train-student", "--cache", tiny_cache, "--arch", "hf:a/b", flag),
        saying=rf"only a Mamba student takes {flag.split('=')[0]}, and --arch hf:a/b",
    )


def test_out_and_device_change_no_result(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    other = resolved(monkeypatch, tiny_cache, tmp_path / "run", "--out", tmp_path / "elsewhere")
    assert changed(base, other) == set()
    assert Path(other["trainer.output_dir"]).parent == tmp_path / "elsewhere"
    if not torch.cuda.is_available():
        other = resolved(monkeypatch, tiny_cache, tmp_path / "run", "--device", "auto")
        assert changed(base, other) == set()


def test_the_teachers_tokenizer_by_name_is_the_caches_own(
    tiny_cache: Path,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: dict[str, Any],
) -> None:
    flags = ("--student-tokenizer", tiny_bert)
    other = resolved(monkeypatch, tiny_cache, tmp_path / "run", *flags)
    assert changed(base, other) == set()


def test_a_longer_limit_is_the_students_and_marks_the_run(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    # The cache was cut at 24 tokens, so a student that reads 64 differs, and must say so.
    flags = ("--max-length", "64", "--on-mismatch", "warn")
    other = resolved(monkeypatch, tiny_cache, tmp_path / "run", *flags)
    assert changed(base, other) == {
        "about.max_length", "about.tokenization", "settings.max_length", "settings.on_mismatch",
    }  # fmt: skip


def test_epochs_are_passes_over_the_labelled_samples(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 120 labelled samples, none held out: 15 batches of 8.
    flags = ("--eval-fraction", "0", "--epochs")
    one = resolved(monkeypatch, tiny_cache, tmp_path / "1", *flags, "1", without="max_steps")
    two = resolved(monkeypatch, tiny_cache, tmp_path / "2", *flags, "2", without="max_steps")
    assert (one["trainer.max_steps"], two["trainer.max_steps"]) == (15, 30)
    assert changed(one, two) == {
        "trainer.max_steps", "trainer.warmup_steps", "batches.num", "settings.epochs",
    }  # fmt: skip


def test_a_mamba_1_has_no_heads_to_size(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    flags = ("--arch", "mamba")
    other = resolved(monkeypatch, tiny_cache, tmp_path / "run", *flags, without="head_dim")
    assert base.keys() - other.keys() == {"settings.head_dim"}
    shared = {name: base[name] for name in other}
    assert changed(shared, other) == {
        "model.arch", "model.weights", "model.head_dim", "settings.arch",
    }  # fmt: skip
    refused = pipe("train-student", "--cache", tiny_cache, *flags, "--head-dim", "8")
    assert refused.code == 2
    assert "--arch mamba has none: leave it out" in " ".join(refused.stderr.split())


def test_unlabelled_batches_leave_the_labelled_ones_as_they_are(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    flags = ("--unlabeled-alpha", "0.3")
    one = resolved(monkeypatch, tiny_cache, tmp_path / "one", *flags)
    two = resolved(monkeypatch, tiny_cache, tmp_path / "two", *flags, "--unlabeled-ratio", "2")
    assert one["batches.order"][::2] == base["batches.order"][:3]
    assert two["batches.order"][::3] == base["batches.order"][:2]
    assert changed(one, two) == {"batches.order", "settings.unlabeled_ratio"}


def test_pooling_of_the_last_position_leaves_the_order(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    other = resolved(monkeypatch, tiny_cache, tmp_path / "run", "--pooling", "last")
    assert changed(base, other) == {"model.pooling", "model.position_map", "settings.pooling"}
