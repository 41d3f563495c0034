"""What each command does once its configuration is resolved: call the stage, print its result."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify as verify_cache
from teacher_cache.pipeline.newest import newest_cache
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
)
from teacher_cache.pipeline.presets import (
    held_out_corpus,
    resolve_cache_teacher,
    resolve_finetune_teacher,
)
from teacher_cache.pipeline.progress import StageOneProgress, TrainingProgress, working
from teacher_cache.pipeline.reporting import console
from teacher_cache.pipeline.sample_view import print_sample
from teacher_cache.pipeline.tables import (
    cost_table,
    join_table,
    manifest_table,
    quality_table,
    settings_table,
)
from teacher_cache.stages import cache_teacher as stage_one
from teacher_cache.stages import evaluate as evaluation
from teacher_cache.stages import finetune_teacher as finetuning
from teacher_cache.stages import train_student as stage_two
from teacher_cache.stages.config import DeviceConfig
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.evaluation.classifier import load_student
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.join.join import Joined, TokenizationMismatch, join
from teacher_cache.stages.join.report import verified_line
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.verify_deep import verify_deep


def finetune_teacher(options: FinetuneTeacherOptions) -> Path:
    """Fine-tune a teacher; return its folder."""
    config = resolve_finetune_teacher(options)
    with TrainingProgress(console, "teacher") as progress:
        result = finetuning.run(config, progress)
    found = (result.record.result or {}).get("evaluation") or {}
    quality = f", held-out accuracy {found['eval_accuracy']:.3f}" if found else ""
    state = "was fine-tuned before" if result.was_complete else "fine-tuned"
    console.print(f"✓ teacher {result.teacher} {state}{quality}", style="green")
    return result.teacher


def cache_teacher(options: CacheTeacherOptions, *, dry_run: bool = False) -> Path | None:
    """Run stage one; return the cache's folder, or None after a dry run."""
    config = resolve_cache_teacher(options)
    if dry_run:
        console.print(settings_table(config.model_dump(mode="json"), "cache-teacher would run"))
        return None
    with StageOneProgress(console) as progress:
        result = stage_one.run(config, progress)
    done = f"{result.num_shards_run:,} shards computed, {result.num_shards_kept:,} kept"
    console.print(manifest_table(result.manifest))
    console.print(f"✓ cache {result.cache} is complete ({done})", style="green")
    return result.cache


def train_student(config: TrainStudentConfig, *, name: str = "student") -> Path:
    """Run stage two; return the run's folder."""
    if config.cache is None:
        config = config.model_copy(update={"cache": newest_cache()})
    console.print(f"cache {config.cache}")
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


def check(cache: Path | None, config: JoinConfig) -> Joined:
    """Run the join alone, on the newest cache if none is named."""
    cache = cache or newest_cache()
    console.print(f"cache {cache}")
    splits = read_manifest(cache).splits
    longest = max(int(CacheReader(cache, split).lengths().max(initial=0)) for split in splits)
    try:
        joined = join(cache, config, longest_sample=longest)
    except TokenizationMismatch as mismatch:
        console.print(join_table(mismatch.report))
        raise
    if joined.report.verified:
        console.print(verified_line(joined.report), style="green")
    else:
        console.print(join_table(joined.report))
    return joined


def inspect(cache: Path, *, sample: str | None, as_json: bool) -> None:
    """Print what a cache holds, or one of its samples."""
    manifest = read_manifest(cache)
    if as_json:
        console.print_json((cache / MANIFEST_NAME).read_text())
        return
    if sample is not None:
        print_sample(console, cache, sample)
        return
    state = "complete" if manifest.complete else "NOT complete: run stage one again, it resumes"
    console.print(f"cache {cache}: {state}; fingerprint {manifest.fingerprint}")
    console.print(settings_table(manifest.settings | {"about": manifest.about}, "settings"))
    console.print(manifest_table(manifest))
    shapes = [f"{one.name} {one.dtype}{list(one.shape) or ''}" for one in manifest.schema]
    console.print("fields of a sample: " + ", ".join(shapes), markup=False)
    if manifest.complete:
        for split in manifest.splits:
            ids = islice(CacheReader(cache, split).sample_ids(), 3)
            console.print(f"first {split} samples: {', '.join(one.hex() for one in ids)}")


def verify(cache: Path, *, deep: int, teacher: str | None) -> None:
    """Check every byte, and with `deep` some logits."""
    total = sum(split.num_shards for split in read_manifest(cache).splits.values())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("verify", total=total)
        report = verify_cache(cache, on_shard=lambda _: progress.advance(task))
    for problem in report.problems:
        console.print(f"✗ {problem}", style="red", markup=False)
    if report.problems:
        raise CheckFailed(
            f"{cache} has {len(report.problems)} problems: run the `pipe cache-teacher` that made "
            "it again, it rebuilds what is damaged and nothing else"
        )
    checked = f"{report.num_shards:,} shards, {report.num_bytes / 1e6:,.2f} MB"
    console.print(f"✓ {cache} is sound: {checked}", style="green")
    if deep:
        with working(console, "running the teacher again"):
            worst = verify_deep(cache, deep, teacher=teacher)
        console.print(f"✓ logits as cached: largest difference {worst:.2g}", style="green")


def evaluate(
    options: EvaluateCommandOptions,
    runs: list[Path],
    *,
    json_file: Path | None = None,
    names: dict[str, str] | None = None,
) -> evaluation.EvaluateResult:
    """Evaluate students beside their teacher and print the table."""
    config = evaluation.EvaluateConfig(
        runs=tuple(runs),
        corpus=held_out_corpus(options),
        **options.model_dump(include=set(evaluation.EvaluateOptions.model_fields)),
    )
    result = evaluation.run(config, on_step=lambda text: console.print(text, style="dim"))
    console.print(quality_table(result, names))
    console.print(
        "agrees: the teacher's class is chosen; KL: from the teacher's distribution, mean nats",
        style="dim",
    )
    console.print(cost_table(result, names))
    for name, mark in result.marks.items():
        console.print(f"! {name}: {mark}", style="yellow")
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def predict(config: DeviceConfig, run: Path, text: str) -> None:
    """Print a label and its probability for each text."""
    texts = [line.rstrip("\n") for line in sys.stdin] if text == "-" else [text]
    classifier = load_student(run, config)
    documents = [
        Document(text=one, source="prompt", split="prompt", position=i)
        for i, one in enumerate(texts)
    ]
    samples = classifier.tokenize(documents)
    if len(samples) < len(documents):
        raise UserError(
            f"{len(documents) - len(samples)} of {len(documents)} texts are empty: leave them out"
        )
    logits = classifier.logits(samples, batch_tokens=8192).astype(np.float64)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    for one, row in zip(texts, probabilities, strict=True):
        label = classifier.id2label[int(row.argmax())]
        console.print(f"{label}\t{row.max():.3f}\t{one}", markup=False, soft_wrap=True)
