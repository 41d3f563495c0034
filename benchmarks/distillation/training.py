"""Teachers, caches and students: the settings of the product's own stages."""

from __future__ import annotations

from pathlib import Path

from benchmarks.distillation.corpora import (
    CORPUS_OF,
    MovieCorpus,
    Name,
    Stage,
    block_of,
    corpus_config,
)
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.rows import Row, Settings
from benchmarks.distillation.scale import Scale
from teacher_cache.pipeline.settings import validate
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig
from teacher_cache.stages.training.config import TrainStudentConfig

BASE_MODEL = "minilm"


def teacher_corpus(row: Row, stage: Stage) -> Name:
    """The corpus whose labels a row's teacher learns from."""
    return CORPUS_OF[row.block if row.teacher == "own" else "main", stage]


def teacher_config(corpus: Name, folders: Folders, scale: Scale) -> FinetuneTeacherConfig:
    """Settings of the teacher that learns from all labels of a corpus.

    Raises:
        UserError: if the recipe's settings are not those of a teacher.
    """
    settings = scale.teachers[block_of(corpus)] | {"max_length": scale.max_length}
    values = {
        **settings,
        "name": corpus,
        "model": str(fetch(BASE_MODEL)),
        "labeled": corpus_config(folders.corpus(corpus), "train"),
        "out": folders.teacher(corpus, settings),
    }
    return validate(FinetuneTeacherConfig, values, where="the recipe's teacher")


def cache_config(corpus: Name, teacher: Path, folders: Folders, scale: Scale) -> CacheTeacherConfig:
    """Settings of the one cache that all rows of a corpus and a teacher are trained from."""
    made_of = {
        "max_length": scale.max_length,
        **scale.captured,
        "views": scale.views[block_of(corpus)],
    }
    values = {
        **made_of,
        "name": corpus,
        "teacher": str(teacher),
        "labeled": corpus_config(folders.corpus(corpus), "train"),
        "unlabeled": corpus_config(folders.corpus(corpus), "unlabeled"),
        "out": folders.cache(corpus, teacher, made_of),
    }
    return validate(CacheTeacherConfig, values, where="the recipe's cache")


def judging_cache_config(
    corpus: MovieCorpus, teacher: Path, folders: Folders, scale: Scale
) -> CacheTeacherConfig:
    """Settings of a cache of the reviews that judge; no student is trained from it.

    Raises:
        UserError: if the recipe's settings are not those of a cache.
    """
    made_of = {"max_length": scale.max_length, **scale.captured}
    name = f"{corpus.name}-{corpus.held_out_split}"
    values = {
        **made_of,
        "name": name,
        "teacher": str(teacher),
        "labeled": corpus_config(folders.corpus(corpus.name), corpus.held_out_split),
        "out": folders.cache(name, teacher, made_of),
    }
    return validate(CacheTeacherConfig, values, where="the recipe's cache")


def student_config(
    row: Row, trial: Settings, seed: int, cache: Path, folders: Folders, scale: Scale
) -> TrainStudentConfig:
    """Settings of one student of a row.

    Args:
        row: whose overrides it gets.
        trial: further overrides, one of the row's trials.
        seed: of weights, order and dropout.
        cache: to train from.
        folders: where its run goes.
        scale: with the settings that all students share.

    Raises:
        UserError: if the recipe's settings are not those of a student.
    """
    steps = {"max_steps": max(1, round(scale.num_steps[row.block] * row.times_steps))}
    values = {**scale.student, **steps, **row.overrides, **trial, "seed": seed}
    config = validate(TrainStudentConfig, values, where=f"the recipe's row {row.key}")
    return config.model_copy(update={"cache": cache, "out": folders.student(config, cache)})
