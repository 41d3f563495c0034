"""What is there before the first student: the teacher, and a cache of each codec.

Every cache is made by stage one from the same chapters; what an earlier run has made is found
again, and what it left unfinished is gone on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.codec_table import teacher
from benchmarks.codec_table.renormalised import renormalised_cache
from benchmarks.codec_table.rows import DENSE, MAX_LENGTH, ON_CPU, Row, Scale, Settings
from benchmarks.distillation.folders import Folders
from teacher_cache.pipeline.progress import StageOneProgress
from teacher_cache.pipeline.settings import validate
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.training.config import TrainStudentConfig


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Teacher and caches.

    Attributes:
        teacher: its folder.
        caches: by what a row's is made of (`Row.kept`).
        held_out: the cache that judges.
    """

    teacher: Path
    caches: dict[Any, Path]
    held_out: Path


def prepare(rows: Sequence[Row], scale: Scale, folders: Folders, console: Console) -> Prepared:
    """Train the teacher and run it over the chapters, once a codec."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    settings = _teacher_settings(scale)
    folder = teacher.train(folders.teacher("austen", settings), scale, say)
    caches: dict[Any, Path] = {}
    learned = teacher.novels("train", scale.num_chapters)
    for row in rows:
        plain = row.codec, False
        if plain not in caches:
            say(f"cache of {dict(row.codec)}")
            caches[plain] = cached(dict(row.codec), folder, learned, folders, console)
        if row.is_renormalised and row.kept not in caches:
            out = caches[plain].with_name(f"{caches[plain].name}-renormalised")
            caches[row.kept] = renormalised_cache(caches[plain], out)
    judges = teacher.novels("test", scale.held_out_chapters)
    say("cache of the held-out chapters")
    return Prepared(
        teacher=folder,
        caches=caches,
        held_out=cached(dict(DENSE), folder, judges, folders, console),
    )


def cached(
    codec: Settings, folder: Path, corpus: CorpusConfig, folders: Folders, console: Console
) -> Path:
    """Stage one's cache of a teacher over a corpus; returns its folder."""
    made_of = {"task": "lm", "max_length": MAX_LENGTH, **ON_CPU, **codec}
    words = "-".join(str(value) for value in codec.values())
    name = f"{corpus.split}-{corpus.max_samples}-{words}"
    values = {
        **made_of,
        "name": name,
        "teacher": str(folder),
        "labeled": corpus,
        "out": folders.cache(name, folder, made_of),
    }
    config = validate(CacheTeacherConfig, values, where="the recipe's cache")
    with StageOneProgress(console) as progress:
        return cache_teacher.run(config, progress).cache


def student_config(
    row: Row, seed: int, cache: Path, scale: Scale, folders: Folders
) -> TrainStudentConfig:
    """Settings of one student."""
    steps = {"max_steps": scale.num_steps, "checkpoint_steps": max(1, scale.num_steps // 2)}
    values = {**scale.student, **ON_CPU, **steps, "alpha": row.alpha, "seed": seed}
    config = validate(TrainStudentConfig, values, where=f"the recipe's row {row.name}")
    return config.model_copy(update={"cache": cache, "out": folders.student(config, cache)})


def _teacher_settings(scale: Scale) -> Settings:
    return {
        "num_ids": scale.num_ids,
        "chapters": scale.teacher_chapters,
        "epochs": scale.teacher_epochs,
        "batch": scale.teacher_batch,
        "lr": scale.teacher_lr,
        **scale.teacher,
    }
