"""What each command does once its configuration is resolved: call the stage, print its result.

`pipe run` does it for teacher, cache, one or more students and evaluation, from one YAML file.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.committed import what_is_missing
from teacher_cache.cache.confusion import Confusion
from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
    ImportOptions,
    PredictSettings,
)
from teacher_cache.pipeline.presets import (
    held_out_corpus,
    resolve_cache_teacher,
    resolve_finetune_teacher,
    with_own_cache,
)
from teacher_cache.pipeline.progress import StageOneProgress, TrainingProgress
from teacher_cache.pipeline.report.report import ReportOptions, write_report
from teacher_cache.pipeline.reporting import console
from teacher_cache.pipeline.settings import (
    apply_settings,
    check_sections,
    read_config_file,
    require_settings,
    validate,
)
from teacher_cache.pipeline.tables import (
    confusion_line,
    confusion_table,
    cost_table,
    estimate_table,
    join_table,
    manifest_table,
    on_labels_line,
    quality_table,
    settings_table,
)
from teacher_cache.stages import cache_log_probs as importing
from teacher_cache.stages import cache_teacher as stage_one
from teacher_cache.stages import convert as conversion
from teacher_cache.stages import evaluate as evaluation
from teacher_cache.stages import finetune_teacher as finetuning
from teacher_cache.stages import train_student as stage_two
from teacher_cache.stages.cache_teacher import estimate
from teacher_cache.stages.codecs.config import ConvertConfig, ConvertOptions
from teacher_cache.stages.config import DeviceConfig, refuse_foreign_options
from teacher_cache.stages.evaluation.config import ClassifyingOptions
from teacher_cache.stages.evaluation.runs import known_task
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.join.join import Joined, TokenizationMismatch, join, joined_line
from teacher_cache.stages.student.interchange.folders import write_mamba_ssm, write_transformers
from teacher_cache.stages.student.interchange.llama_cpp import write_gguf
from teacher_cache.stages.student.interchange.onnx import write_onnx
from teacher_cache.stages.student.interchange.web_page import write_page
from teacher_cache.stages.tasks import TASKS, task_named
from teacher_cache.stages.train_student import check_architecture
from teacher_cache.stages.training.config import TrainStudentConfig

CACHES = Path("caches")
# Of a teacher, by the name of the figure: what it is called.
HELD_OUT_QUALITY = {
    "eval_accuracy": "accuracy",
    "eval_micro_f1": "micro F1",
    "eval_mse": "mean squared error",
}
EXPORTS = {
    "gguf": write_gguf,
    "html": write_page,
    "mamba-ssm": write_mamba_ssm,
    "onnx": write_onnx,
    "transformers": write_transformers,
}

logger = logging.getLogger(__name__)


def newest_cache(folder: Path = CACHES) -> Path:
    """The complete cache with the newest manifest; names those that are not complete.

    Raises:
        UserError: if there is none, or one cannot be read: it might be the one that was meant.
    """
    complete = []
    for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        if manifest.complete:
            complete.append((manifest.completed_at, path.parent))
        else:
            logger.warning("passed over: %s", what_is_missing(path.parent, manifest))
    if not complete:
        raise UserError(
            f"there is no complete cache in {folder}: run `pipe cache-teacher --data ...` first, "
            "or name one with --cache"
        )
    return max(complete)[1]


def finetune_teacher(options: FinetuneTeacherOptions) -> Path:
    """Fine-tune a teacher; return its folder."""
    config = resolve_finetune_teacher(options)
    with TrainingProgress(console, "teacher") as progress:
        result = finetuning.run(config, progress)
    found = (result.record.result or {}).get("evaluation") or {}
    quality = "".join(
        f", held-out {words} {found[name]:.3f}"
        for name, words in HELD_OUT_QUALITY.items()
        if name in found
    )
    state = "was fine-tuned before" if result.was_complete else "fine-tuned"
    console.print(f"✓ teacher {result.teacher} {state}{quality}", style="green")
    return result.teacher


def cache_teacher(options: CacheTeacherOptions, *, dry_run: bool = False) -> Path | None:
    """Run stage one; return the cache's folder, or None after a dry run."""
    config = resolve_cache_teacher(options)
    if dry_run:
        console.print(settings_table(config.model_dump(mode="json"), "cache-teacher would run"))
        has_codec = TASKS[config.task].has_codec
        if has_codec or config.layers.attention != "none" or config.layers.hidden != "none":
            console.print(estimate_table(estimate(config), of_codec=has_codec))
        return None
    with StageOneProgress(console) as progress:
        result = stage_one.run(config, progress)
    done = f"{result.num_shards_run:,} shards computed, {result.num_shards_kept:,} kept"
    if not result.manifest.complete:
        console.print(
            f"✓ slice {config.workers.slice} of {result.cache} is done ({done})", style="green"
        )
        console.print(what_is_missing(result.cache, result.manifest), soft_wrap=True)
        return result.cache
    console.print(manifest_table(result.manifest))
    confusion = Confusion.recorded(result.manifest)
    if confusion is not None:
        names = result.manifest.about["id2label"]
        console.print(confusion_line(confusion, names), soft_wrap=True)
        console.print(confusion_table(confusion, names))
    line = on_labels_line(result.manifest)
    if line is not None:
        console.print(line, soft_wrap=True)
    console.print(f"✓ cache {result.cache} is complete ({done})", style="green")
    return result.cache


def convert(options: ConvertOptions, cache: Path, out: Path) -> Path:
    """Write a cache again as another; return the new one's folder."""
    config = ConvertConfig.of(cache=cache, out=out, **options.given)
    with StageOneProgress(console, "convert") as progress:
        result = conversion.run(config, progress)
    done = f"{result.num_shards_run:,} shards written, {result.num_shards_kept:,} kept"
    console.print(manifest_table(result.manifest))
    console.print(f"✓ cache {result.cache} is complete ({done})", style="green")
    return result.cache


def import_log_probs(options: ImportOptions, answers: Path, out: Path) -> Path:
    """Make a cache of an engine's answers; return its folder."""
    manifest = importing.run(out, answers, **options.model_dump())
    console.print(manifest_table(manifest))
    console.print(f"✓ cache {out} is complete", style="green")
    return out


def train_student(config: TrainStudentConfig, *, name: str = "student") -> Path:
    """Run stage two; return the run's folder."""
    if config.training.cache is None:
        config = config.model_copy(update={"cache": newest_cache()})
    console.print(f"cache {config.training.cache}")
    try:
        with TrainingProgress(console, name) as progress:
            result = stage_two.run(config, progress)
    except TokenizationMismatch as mismatch:
        console.print(join_table(mismatch.report))
        raise
    record = result.record
    state = "was trained before" if result.was_complete else "trained"
    seconds = (record.result or {})["seconds"]
    console.print(f"✓ {name} {state}: {result.run} ({seconds:,.0f} s)", style="green")
    return result.run


def check(config: TrainStudentConfig) -> Joined:
    """Run the join alone, on the newest cache if none is named."""
    cache = config.training.cache or newest_cache()
    console.print(f"cache {cache}")
    manifest = read_manifest(cache)
    lengths = [CacheReader(cache, split).lengths() for split in manifest.splits]
    longest = max(int(found.max(initial=0)) for found in lengths)
    try:
        task = task_named(manifest.settings["task"], cache)
        own = stage_two.with_own_tokenizer(config, task.student)
        joined = join(cache, own, longest_sample=longest)
    except TokenizationMismatch as mismatch:
        console.print(join_table(mismatch.report))
        raise
    line = joined_line(joined)
    if line is not None:
        console.print(line, style="green", soft_wrap=True)
    else:
        console.print(join_table(joined.report))
    return joined


def evaluate(
    options: EvaluateCommandOptions,
    runs: list[Path],
    *,
    json_file: Path | None = None,
    names: dict[str, str] | None = None,
) -> evaluation.EvaluateResult:
    """Evaluate students beside their teacher; print how well they predict, and what they write."""
    config = EvaluateConfig(
        runs=tuple(runs),
        corpus=held_out_corpus(options, known_task(runs)),
        cache=options.cache,
        **options.evaluation.given,
        **options.answers.given,
    )
    result = evaluation.run(config, on_step=lambda text: console.print(text, style="dim"))
    console.print(quality_table(result, names))
    console.print(result.rows[0].legend, style="dim")
    for row in result.rows if result.prompt is not None else ():
        if row.written is not None:
            name = (names or {}).get(row.name, row.name)
            console.print(f"{name}: {result.prompt}|{row.written}", soft_wrap=True)
    console.print(cost_table(result, names))
    for name, mark in result.marks.items():
        console.print(f"! {name}: {mark}", style="yellow")
    if json_file is not None:
        figures = json.dumps(result.to_json(), indent=1)
        write_bytes_atomically(json_file, f"{figures}\n".encode())
    return result


def predict(options: PredictSettings, run: Path, text: str) -> None:
    """Print a label and its probability for each text, or what a language model makes of it."""
    is_stream = text == "-"
    texts = [line.rstrip("\n") for line in sys.stdin] if is_stream else [text]
    task = known_task([run]).evaluation
    for answer in task.predict(
        run,
        texts,
        device=options.evaluation,
        generation=options.generation,
        classifying=ClassifyingOptions(**options.pair.given, **options.answers.given),
        one_a_line=is_stream,
    ):
        print(answer)  # not through rich, which would make spaces of the tabs


def export(run: Path, out: Path, *, to: str, ids_only: bool = False) -> None:
    """Write a student as a file or folder of another format.

    Raises:
        UserError: if there is no such format, or the student has no counterpart in it.
    """
    if to not in EXPORTS:
        raise UserError(f"there is no format --to {to}: {did_you_mean(to, EXPORTS)}")
    if ids_only and to != "gguf":
        raise UserError(f"--ids-only is for --to gguf, and this is --to {to}: leave it out")
    student = known_task([run]).evaluation.student.of_run(run, DeviceConfig(device="cpu"))
    if to == "html" and student.pair is not None:
        raise UserError(
            f"{run} reads pairs ({', '.join(student.pair)}), and the page has room for one text: "
            "give a student of single texts, or --to onnx"
        )
    EXPORTS[to](student.model, None if ids_only else student.tokenizer, out, source=str(run))
    console.print(f"✓ export {out}", style="green", soft_wrap=True)


def report(options: ReportOptions, page: Path) -> None:
    """Write what runs came to as a page."""
    write_report(options, page, lambda text: console.print(text, style="dim"))
    console.print(f"✓ report {page}", style="green", soft_wrap=True)


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
    for section, command in (("convert", "convert"), ("import_log_probs", "import-log-probs")):
        if section in content:
            raise UserError(
                f"--config {config} has a section {section}, which `pipe run` has no step for: "
                f"leave it out, and use `pipe {command}`"
            )
    if "cache_teacher" not in content:
        raise UserError(f"--config {config} has no section cache_teacher: there is nothing to run")
    stages = _validated(content)
    _refuse_early(stages)

    teacher = stages.get("finetune_teacher")
    cache_options = stages["cache_teacher"]
    if teacher is not None:
        _heading(console, "fine-tuning the teacher")
        folder = finetune_teacher(teacher)
        cache_options = cache_options.model_copy(
            update={"teacher": cache_options.teacher or str(folder)}
        )
    _heading(console, "stage one: caching the teacher")
    cache = cache_teacher(cache_options)
    assert cache is not None
    runs: dict[str, Path] = {}
    for name, student in stages["students"].items():
        _heading(console, f"stage two: {name}")
        out = student.training.out or Path("runs") / f"{cache.name}-{_slug(name)}"
        update = {"cache": cache, "out": out}
        runs[name] = train_student(student.model_copy(update=update), name=name)
    if "evaluate" in stages and runs:
        _heading(console, "evaluation")
        beside = next(iter(runs.values())).parent
        figures = beside / f"{cache.name}-evaluation.json"
        evaluate(
            with_own_cache(stages["evaluate"], cache),
            list(runs.values()),
            json_file=figures,
            names={folder.name: name for name, folder in runs.items()},
        )
        report(
            ReportOptions(runs=list(runs.values()), cache=cache, evaluation=figures),
            beside / f"{cache.name}-report.html",
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


def _refuse_early(stages: Mapping[str, Any]) -> None:
    """Refuse now what a stage would refuse when its turn comes, hours from now perhaps."""
    options = stages["cache_teacher"]
    if "finetune_teacher" in stages:
        options = options.model_copy(update={"teacher": options.teacher or "made by this run"})
    task = TASKS[resolve_cache_teacher(options).task]
    if "evaluate" in stages:
        to_come = Path("made by this run")
        held_out_corpus(with_own_cache(stages["evaluate"], to_come), task)
    for student in stages["students"].values():
        refuse_foreign_options(student, task=task.name)
        check_architecture(student.student, task.student)


def _heading(console: Console, text: str) -> None:
    console.rule(Text(text, style="bold"), align="left")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
