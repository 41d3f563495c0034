"""A tiny cache of real reviews, and students that train on it in a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.schema import Fields
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.data.tokenization import Sample
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.join import Joined, join
from teacher_cache.stages.teacher.classification import Classification
from teacher_cache.stages.teacher.layers import NO_LAYERS, LayerTap
from teacher_cache.stages.teacher.load import ClassificationTeacher
from teacher_cache.stages.tokens.record import TokenizationRecord, describe
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.model_card import CARD_NAME
from teacher_cache.stages.training.run_folder import RUN_NAME, read_run

MAX_LENGTH = 24
CLOCK = ("runtime", "per_second")


def reviews_config(
    folder: Path, teacher: Path, acl_imdb: Path, **changes: Any
) -> CacheTeacherConfig:
    """Stage one over reviews in IMDb's layout, labelled and not."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": MAX_LENGTH,
        "labeled": CorpusConfig(source=str(acl_imdb), split="train"),
        "unlabeled": CorpusConfig(source=str(acl_imdb), split="unsupervised", labeled=False),
        "out": folder,
    }
    return CacheTeacherConfig.of(**(settings | changes))


def cache_reviews(folder: Path, teacher: Path, acl_imdb: Path, **changes: Any) -> Path:
    """Run it; returns the folder."""
    return cache_teacher.run(reviews_config(folder, teacher, acl_imdb, **changes)).cache


def said_of(
    teacher: ClassificationTeacher, samples: Sequence[Sample], *, pooled_width: int | None = None
) -> Fields:
    """A shard's fields, of samples that are no corpus's."""
    task = Classification(
        teacher=teacher,
        corpora={},
        max_length=MAX_LENGTH,
        batch_tokens=64,
        pooled_width=pooled_width,
        layers=NO_LAYERS,
    )
    silent = LayerTap(teacher.model, NO_LAYERS, lambda *_: None)
    return task.say(samples, silent, lambda *_: None).fields


def language_config(
    folder: Path | None, teacher: Path, acl_imdb: Path, **changes: Any
) -> CacheTeacherConfig:
    """Stage one of a language model over the texts of the same reviews, a second corpus too."""
    source = str(acl_imdb)
    settings: dict[str, Any] = {
        "name": "tiny-lm",
        "task": "lm",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": MAX_LENGTH,
        "top_k": 6,
        "labeled": CorpusConfig(source=source, split="train", labeled=False, max_samples=10),
        "unlabeled": CorpusConfig(
            source=source, split="unsupervised", labeled=False, max_samples=8
        ),
        "out": folder,
    }
    return CacheTeacherConfig.of(**(settings | changes))


def cache_language(folder: Path, teacher: Path, acl_imdb: Path, **changes: Any) -> Path:
    """Run it; returns the folder."""
    return cache_teacher.run(language_config(folder, teacher, acl_imdb, **changes)).cache


def student_config(cache: Path, out: Path, **changes: Any) -> TrainStudentConfig:
    """Settings of a student of one narrow layer that trains for six short steps."""
    settings: dict[str, Any] = {
        "cache": cache,
        "out": out,
        "device": "cpu",
        "d_model": 8,
        "num_layers": 1,
        "expand": 2,
        "d_state": 4,
        "head_dim": 8,
        "batch_size": 8,
        "max_steps": 6,
        "checkpoint_steps": 2,
        "log_steps": 1,
        "eval_fraction": 0.2,
    }
    return TrainStudentConfig.of(**(settings | changes))


def result_log(run: Path) -> list[dict[str, Any]]:
    """The log of a finished run without what the clock says."""
    result = read_run(run).result or {}
    lines = [line for line in result["log"] if "train_runtime" not in line]
    return [{k: v for k, v in line.items() if not k.endswith(CLOCK)} for line in lines]


def result_files(run: Path) -> dict[str, bytes]:
    """Every file of a finished run's result by name; its log without what the clock says.

    The card is named after the folder, which may be another.
    """
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    if CARD_NAME in files:
        card = files[CARD_NAME].decode()
        for line in (f"- name: {run.name}\n", f"# {run.name}\n"):
            card = card.replace(line, line.replace(run.name, "RUN"))
        files[CARD_NAME] = card.encode()
    record = read_run(run)
    told = (record.settings, (record.result or {})["num_steps"], result_log(run))
    return files | {RUN_NAME: repr(told).encode()}


def read_tokenizers_once(replace: Callable[[str, Any], None]) -> None:
    """Join, and describe a tokenizer, once each: on 30,522 ids that takes longer than a training.

    Args:
        replace: sets a name in the stage's module.
    """
    joined: dict[tuple[Any, ...], Joined] = {}
    described: dict[tuple[str, int], TokenizationRecord] = {}

    def join_once(cache: Path, config: JoinConfig, *, longest_sample: int) -> Joined:
        key = (cache, *(getattr(config, name) for name in JoinConfig.model_fields), longest_sample)
        if key not in joined:
            joined[key] = join(cache, config, longest_sample=longest_sample)
        return joined[key]

    def describe_once(tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> TokenizationRecord:
        key = (tokenizer.name_or_path, max_length)
        if key not in described:
            described[key] = describe(tokenizer, max_length=max_length)
        return described[key]

    replace("join", join_once)
    replace("describe", describe_once)
