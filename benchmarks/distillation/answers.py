"""Train what the rows ask for, and collect what it says of the held-out reviews."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.distillation import predictions, tfidf
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.jobs import Job
from benchmarks.distillation.preparation import Prepared
from benchmarks.distillation.results import Answers, majority_logits
from benchmarks.distillation.rows import Row, Settings
from benchmarks.distillation.scale import Scale
from benchmarks.distillation.training import student_config
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.packaged.reviews import LABEL_NAMES
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run

Asked = tuple[Row, Settings, int]  # a row, a trial of it, a seed


class Models:
    """The models that some rows ask for; rows that ask for the same training share it.

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
        self._asked = asked

    def jobs(self) -> list[Job]:
        """One for each student, the longest first: no core waits for a long one at the end."""
        found: dict[Path, Job] = {}
        for row, trial, seed in self._asked:
            if row.kind != "student":
                continue
            config = self._config(row, trial, seed)
            folder = config.training.out
            assert folder is not None
            words = ", ".join(f"{name} {value}" for name, value in {**trial, "seed": seed}.items())
            title = f"{row.key} ({words})"
            held_out = self._prepared.held_out[row.block]
            found.setdefault(folder, Job(title=title, config=config, held_out=held_out))
        return sorted(found.values(), key=lambda job: -(job.config.training.max_steps or 0))

    def answers(self, row: Row, trial: Settings, seeds: tuple[int, ...]) -> Answers:
        """What a row's models say, once its students are trained."""
        taught_by = self.teacher_prediction(row).logits
        if row.kind == "majority":
            labels = [
                LABEL_NAMES.index(one["category"]) for one in self._prepared.corpus(row).train
            ]
            logits = majority_logits(labels, len(taught_by))
            return Answers(row=row, seeds=(0,), logits=(logits,), taught_by=taught_by)
        if row.kind == "tfidf":
            return self._tfidf_answers(row, trial, taught_by)
        if row.kind == "teacher":
            seeds, runs = (0,), [self._prepared.teacher(row)]
            found = [self.teacher_prediction(row)]
        else:
            held_out = self._prepared.held_out[row.block]
            runs = [self.run(row, trial, seed) for seed in seeds]
            found = [predictions.of_student(run, held_out) for run in runs]
        return Answers(
            row=row,
            seeds=seeds,
            logits=tuple(one.logits for one in found),
            taught_by=taught_by,
            seconds=tuple((read_run(run).result or {})["seconds"] for run in runs),
            num_parameters=found[0].num_parameters,
            num_outside=found[0].num_outside,
            settings=trial,
        )

    def teacher_prediction(self, row: Row) -> predictions.Prediction:
        """What a row's teacher says of the reviews that judge the row."""
        held_out, max_length = self._prepared.held_out[row.block], self._scale.max_length
        return predictions.of_teacher(self._prepared.teacher(row), max_length, held_out)

    def load_teacher(self, row: Row) -> Classifier:
        """A row's teacher, ready to classify."""
        return predictions.load_teacher(self._prepared.teacher(row), self._scale.max_length)

    def load_student(self, row: Row, trial: Settings, seed: int) -> Classifier:
        """One trained student, ready to classify."""
        return Classifier.of_run(self.run(row, trial, seed), DeviceConfig())

    def _tfidf_answers(self, row: Row, trial: Settings, taught_by: np.ndarray) -> Answers:
        texts = [one.text for one in self._prepared.held_out[row.block].documents]
        fitted = tfidf.fit(self._prepared.corpus(row).train, texts, trial)
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

    def run(self, row: Row, trial: Settings, seed: int) -> Path:
        """Folder of one trained student."""
        out = self._config(row, trial, seed).training.out
        assert out is not None
        return out

    def _config(self, row: Row, trial: Settings, seed: int) -> TrainStudentConfig:
        cache = self._prepared.cache(row)
        return student_config(row, trial, seed, cache, self._folders, self._scale)
