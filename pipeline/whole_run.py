"""`pipe run`: teacher, cache, one or more students, evaluation, from one YAML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline import commands
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
)
from teacher_cache.pipeline.presets import (
    held_out_corpus,
    resolve_cache_teacher,
    with_own_cache,
)
from teacher_cache.pipeline.settings import (
    apply_settings,
    check_sections,
    read_config_file,
    require_settings,
    validate,
)
from teacher_cache.stages.config import refuse_foreign_options
from teacher_cache.stages.tasks import TASKS, KnownTask
from teacher_cache.stages.train_student import check_architecture
from teacher_cache.stages.training.config import TrainStudentConfig


def run_all(
    config: str, settings: Sequence[str], *, sections: Sequence[str], console: Console
) -> None:
    """Run every section that the file has; each stage resumes where an earlier run stopped.

    Args:
        config: YAML file, or the name of one of the package's.
        settings: of `--set`, each `section.key=value`.
        sections: the sections that a file may have.
        console: where to print.

    Raises:
        UserError: for an unknown section or key, or anything that a stage refuses.
    """
    content = read_config_file(config)
    apply_settings(content, settings)
    check_sections(content, sections, f"--config {config}")
    if "convert" in content:
        raise UserError(
            f"--config {config} has a section convert, which `pipe run` has no step for: leave it "
            "out, and run `pipe convert` on the cache"
        )
    if "cache_teacher" not in content:
        raise UserError(f"--config {config} has no section cache_teacher: there is nothing to run")
    stages = _validated(content)
    task = _refuse_early(stages)

    teacher = stages.get("finetune_teacher")
    cache_options = stages["cache_teacher"]
    if teacher is not None:
        _heading(console, "fine-tuning the teacher")
        folder = commands.finetune_teacher(teacher)
        cache_options = cache_options.model_copy(
            update={"teacher": cache_options.teacher or str(folder)}
        )
    _heading(console, "stage one: caching the teacher")
    cache = commands.cache_teacher(cache_options)
    assert cache is not None
    runs: dict[str, Path] = {}
    for name, student in stages["students"].items():
        _heading(console, f"stage two: {name}")
        out = student.training.out or Path("runs") / f"{cache.name}-{_slug(name)}"
        update = {"cache": cache, "out": out}
        runs[name] = commands.train_student(student.model_copy(update=update), name=name)
    if "evaluate" in stages and runs:
        _heading(console, "evaluation")
        commands.evaluate(
            with_own_cache(stages["evaluate"], task, cache),
            list(runs.values()),
            json_file=next(iter(runs.values())).parent / f"{cache.name}-evaluation.json",
            names={folder.name: name for name, folder in runs.items()},
        )


def _validated(content: Mapping[str, Any]) -> dict[str, Any]:
    """Every section's configuration, all checked before anything runs."""
    stages: dict[str, Any] = {}
    for section, model in (
        ("finetune_teacher", FinetuneTeacherOptions),
        ("cache_teacher", CacheTeacherOptions),
        ("evaluate", EvaluateCommandOptions),
    ):
        if section in content:
            stages[section] = validate(model, content[section] or {}, where=section)
    shared = content.get("train_student") or {}
    named = {str(name): own for name, own in (content.get("students") or {"student": {}}).items()}
    slugs = Counter(_slug(name) for name in named)
    if slugs and slugs.most_common(1)[0][1] > 1:
        raise UserError(
            f"two students would have the folder name {slugs.most_common(1)[0][0]!r}: name them "
            "apart in the section students"
        )
    for name, own in named.items():
        require_settings(own, f"the student {name!r}")
    stages["students"] = {
        name: validate(TrainStudentConfig, shared | (own or {}), where=f"students.{name}")
        for name, own in named.items()
    }
    if any(student.training.cache is not None for student in stages["students"].values()):
        raise UserError(
            "`pipe run` trains from the cache that it makes, and train_student.cache names "
            "another: leave it out, or use `pipe train-student --config`"
        )
    return stages


def _refuse_early(stages: Mapping[str, Any]) -> KnownTask:
    """Refuse now what a stage would refuse when its turn comes, hours from now perhaps.

    Returns:
        The task of the run.
    """
    options = stages["cache_teacher"]
    if "finetune_teacher" in stages:
        options = options.model_copy(update={"teacher": options.teacher or "made by this run"})
    task = TASKS[resolve_cache_teacher(options).task]
    if "evaluate" in stages:
        to_come = Path("made by this run")
        held_out_corpus(with_own_cache(stages["evaluate"], task, to_come), task)
    for student in stages["students"].values():
        refuse_foreign_options(student, task=task.name)
        check_architecture(student.student, task.student)
    return task


def _heading(console: Console, text: str) -> None:
    console.rule(Text(text, style="bold"), align="left")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
