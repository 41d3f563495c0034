"""Train what the rows ask for, and collect what it says of the held-out reviews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.distillation import predictions, tfidf
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.jobs import Job
from benchmarks.distillation.preparation import Prepared
from benchmarks.distillation.results import Answers, majority_logits
from benchmarks.distillation.rows import Row, Scale, Settings
from benchmarks.distillation.training import student_config
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.reviews import LABEL_NAMES
from teacher_cache.stages.evaluation.classifier import Classifier, load_student
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run

Asked = tuple[Row, Settings, int]  # a row, a trial of it, a seed


class Students:
    """The students that some rows ask for; rows that ask for the same training share it.

    Args:
        asked: row, trial and seed of each.
        prepared: what they learn from.
        folders: where their runs go.
        scale: with the settings that all share.
    """

    def __init__(
        self, asked: Sequence[Asked], prepared: Prepared, folders: Folders, scale: Scale
    ) -> None:
        self._prepared, self._folders, self._scale = prepared, folders, scale
        self._asked = [one for one in asked if one[0].kind == "student"]

    def jobs(self) -> list[Job]:
        """One for each run, in the order of the rows."""
        found: dict[Path, Job] = {}
        for row, trial, seed in self._asked:
            config = self._config(row, trial, seed)
            assert config.out is not None
            words = ", ".join(f"{name} {value}" for name, value in {**trial, "seed": seed}.items())
            title = f"{row.key} ({words})"
            held_out = self._prepared.held_out[row.block]
            found.setdefault(config.out, Job(title=title, config=config, held_out=held_out))
        return list(found.values())

    def answers(self, row: Row, trial: Settings, seeds: tuple[int, ...]) -> Answers:
        """What a row's trained students say."""
        runs = [self._config(row, trial, seed).out for seed in seeds]
        held_out = self._prepared.held_out[row.block]
        found = [predictions.of_student(run, held_out) for run in runs if run is not None]
        return Answers(
            row=row,
            seeds=seeds,
            logits=tuple(one.logits for one in found),
            taught_by=teacher_logits(row, self._prepared, self._scale),
            seconds=tuple(_seconds(run) for run in runs if run is not None),
            num_parameters=found[0].num_parameters,
            num_outside=found[0].num_outside,
            settings=trial,
        )

    def load(self, row: Row, trial: Settings, seed: int) -> Classifier:
        """One trained student, ready to classify."""
        out = self._config(row, trial, seed).out
        assert out is not None
        return load_student(out, DeviceConfig())

    def _config(self, row: Row, trial: Settings, seed: int) -> TrainStudentConfig:
        cache = self._prepared.cache(row)
        return student_config(row, trial, seed, cache, self._folders, self._scale)


def baseline_answers(
    row: Row, trial: Mapping[str, float], prepared: Prepared, scale: Scale
) -> Answers:
    """What the majority, TF-IDF with this trial, or the teacher says."""
    train, held_out = prepared.corpus(row).train, prepared.held_out[row.block]
    taught_by = teacher_logits(row, prepared, scale)
    if row.kind == "majority":
        labels = [LABEL_NAMES.index(one["category"]) for one in train]
        logits = majority_logits(labels, len(held_out.labels))
        return Answers(row=row, seeds=(0,), logits=(logits,), taught_by=taught_by)
    if row.kind == "tfidf":
        fitted = tfidf.fit(train, [one.text for one in held_out.documents], **trial)
        return Answers(
            row=row,
            seeds=(0,),
            logits=(fitted.log_probs,),
            taught_by=taught_by,
            seconds=(fitted.seconds,),
            num_parameters=fitted.num_parameters,
            num_outside=fitted.num_parameters,
            settings=trial,
        )
    found = _teacher(row, prepared, scale)
    return Answers(
        row=row,
        seeds=(0,),
        logits=(found.logits,),
        taught_by=taught_by,
        seconds=(_seconds(prepared.teacher(row)),),
        num_parameters=found.num_parameters,
        num_outside=found.num_outside,
    )


def teacher_logits(row: Row, prepared: Prepared, scale: Scale) -> np.ndarray:
    """[N, C] what a row's teacher says of the reviews that judge the row."""
    return _teacher(row, prepared, scale).logits


def _teacher(row: Row, prepared: Prepared, scale: Scale) -> predictions.Prediction:
    held_out = prepared.held_out[row.block]
    return predictions.of_teacher(prepared.teacher(row), scale.teacher["max_length"], held_out)


def _seconds(run: Path) -> float:
    return (read_run(run).result or {})["seconds"]
