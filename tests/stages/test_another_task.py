"""A whole task, from outside: its part of each stage, and its entry in the table of tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.stages import cache_teacher, evaluate, tasks, train_student, verify
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.evaluation.classification import Classification as OfClasses
from teacher_cache.stages.evaluation.config import GenerationOptions
from teacher_cache.stages.evaluation.models import Classifier
from teacher_cache.stages.evaluation.runs import known_task
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.join.join import Joined
from teacher_cache.stages.teacher.classification import Classification as OfLogits
from teacher_cache.stages.training.classification import ClassificationStudents
from teacher_cache.stages.training.task import Course
from tests.tiny_runs import reviews_config, student_config

NAME = "topics"


class TopicTeacher(OfLogits):
    """Stage one's part."""

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"task": NAME}


class TopicStudents(ClassificationStudents):
    """Stage two's part."""

    name = NAME

    def course(self, joined: Joined) -> Course:
        found = super().course(joined)
        settings = found.student.settings | {"task": NAME}
        return replace(found, student=replace(found.student, settings=settings))


@dataclass(frozen=True, kw_only=True)
class TopicModel(Classifier):
    """Of a topic."""

    task = NAME


class TopicEvaluation(OfClasses):
    """The evaluation's part."""

    student = teacher = TopicModel


class Topics(tasks.Classification):
    """The entry in the table."""

    name = NAME
    kind = "a model of topics"

    @property
    def teacher(self) -> type[TopicTeacher]:
        return TopicTeacher

    @property
    def student(self) -> type[TopicStudents]:
        return TopicStudents

    @property
    def evaluation(self) -> TopicEvaluation:
        return TopicEvaluation()


def test_a_task_is_its_part_of_each_stage_and_an_entry(
    tiny_bert: Path, acl_imdb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, NAME, Topics())
    config = reviews_config(tmp_path / "c", tiny_bert, acl_imdb).model_copy(update={"task": NAME})
    cache = cache_teacher.run(config).cache
    assert read_manifest(cache).settings["task"] == NAME
    assert verify.verify_deep(cache, 2) < 1e-3
    run = train_student.run(student_config(cache, tmp_path / "r")).run
    assert known_task([run]).name == NAME
    corpus = CorpusConfig(source=str(acl_imdb), split="test", max_samples=8)
    asked = EvaluateConfig(runs=(run,), corpus=corpus, device="cpu", latency_lengths=(8,))
    assert [row.name for row in evaluate.run(asked).rows] == ["majority", "teacher", "r"]
    (answer,) = known_task([run]).evaluation.predict(
        run,
        ["a good film"],
        device=DeviceConfig(device="cpu"),
        generation=GenerationOptions(),
        one_a_line=False,
    )
    assert answer.endswith("\ta good film")
    with pytest.raises(UserError, match="is a model of topics: give a classifier's run"):
        Classifier.of_run(run, DeviceConfig(device="cpu"))
