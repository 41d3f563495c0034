"""What each command does once its configuration is resolved: call the stage, print its result."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
    PredictSettings,
)
from teacher_cache.pipeline.presets import (
    held_out_corpus,
    held_out_text,
    resolve_cache_teacher,
    resolve_finetune_teacher,
)
from teacher_cache.pipeline.progress import StageOneProgress, TrainingProgress
from teacher_cache.pipeline.reporting import console
from teacher_cache.pipeline.tables import (
    cost_table,
    estimate_table,
    join_table,
    language_model_table,
    manifest_table,
    quality_table,
    settings_table,
)
from teacher_cache.stages import cache_teacher as stage_one
from teacher_cache.stages import convert as conversion
from teacher_cache.stages import evaluate as evaluation
from teacher_cache.stages import evaluate_language_model
from teacher_cache.stages import finetune_teacher as finetuning
from teacher_cache.stages import train_student as stage_two
from teacher_cache.stages.codecs.config import ConvertConfig, ConvertOptions
from teacher_cache.stages.data.documents import Document
from teacher_cache.stages.estimate import estimate
from teacher_cache.stages.evaluate_language_model import EvaluateLanguageModelResult
from teacher_cache.stages.evaluation.config import EvaluateOptions
from teacher_cache.stages.evaluation.generation import check_generation, continuation, prompt_ids
from teacher_cache.stages.evaluation.models import load_student, load_student_language_model
from teacher_cache.stages.evaluation.runs import task_of
from teacher_cache.stages.join.join import Joined, TokenizationMismatch, join, joined_line
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.start import with_own_tokenizer

CACHES = Path("caches")

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
            logger.warning("passed over: %s is not complete", path.parent)
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
    quality = f", held-out accuracy {found['eval_accuracy']:.3f}" if found else ""
    state = "was fine-tuned before" if result.was_complete else "fine-tuned"
    console.print(f"✓ teacher {result.teacher} {state}{quality}", style="green")
    return result.teacher


def cache_teacher(options: CacheTeacherOptions, *, dry_run: bool = False) -> Path | None:
    """Run stage one; return the cache's folder, or None after a dry run."""
    config = resolve_cache_teacher(options)
    if dry_run:
        console.print(settings_table(config.model_dump(mode="json"), "cache-teacher would run"))
        if config.task == "lm" or config.attention != "none" or config.hidden != "none":
            console.print(estimate_table(estimate(config), is_language_model=config.task == "lm"))
        return None
    with StageOneProgress(console) as progress:
        result = stage_one.run(config, progress)
    done = f"{result.num_shards_run:,} shards computed, {result.num_shards_kept:,} kept"
    console.print(manifest_table(result.manifest))
    console.print(f"✓ cache {result.cache} is complete ({done})", style="green")
    return result.cache


def convert(options: ConvertOptions, cache: Path, out: Path) -> Path:
    """Write a cache again as another; return the new one's folder."""
    config = ConvertConfig(cache=cache, out=out, **options.model_dump())
    with StageOneProgress(console, "convert") as progress:
        result = conversion.run(config, progress)
    done = f"{result.num_shards_run:,} shards written, {result.num_shards_kept:,} kept"
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


def check(config: TrainStudentConfig) -> Joined:
    """Run the join alone, on the newest cache if none is named."""
    cache = config.cache or newest_cache()
    console.print(f"cache {cache}")
    manifest = read_manifest(cache)
    lengths = [CacheReader(cache, split).lengths() for split in manifest.splits]
    longest = max(int(found.max(initial=0)) for found in lengths)
    try:
        own = with_own_tokenizer(config, task=manifest.settings["task"])
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
) -> evaluation.EvaluateResult | EvaluateLanguageModelResult:
    """Evaluate students beside their teacher and print the tables."""
    run = evaluate_language_models if task_of(runs) == "lm" else evaluate_classifiers
    result = run(options, runs, names)
    console.print(cost_table(result, names))
    for name, mark in result.marks.items():
        console.print(f"! {name}: {mark}", style="yellow")
    if json_file is not None:
        figures = json.dumps(asdict(result), indent=1)
        write_bytes_atomically(json_file, f"{figures}\n".encode())
    return result


def evaluate_classifiers(
    options: EvaluateCommandOptions, runs: list[Path], names: dict[str, str] | None
) -> evaluation.EvaluateResult:
    """Evaluate classifiers and print how well they classify."""
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
    return result


def predict(options: PredictSettings, run: Path, text: str) -> None:
    """Print a label and its probability for each text, or what a language model makes of it."""
    texts = [line.rstrip("\n") for line in sys.stdin] if text == "-" else [text]
    if task_of([run]) == "lm":
        go_on(options, run, texts, as_json=text == "-")
        return
    if options.given:
        raise UserError(
            f"{', '.join(options.given)} is of language models, and {run} is a classifier: leave "
            "that out"
        )
    classifier = load_student(run, options)
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
        # Not through rich, which would make spaces of the tabs.
        print(f"{label}\t{row.max():.3f}\t{one}")


def evaluate_language_models(
    options: EvaluateCommandOptions, runs: list[Path], names: dict[str, str] | None
) -> EvaluateLanguageModelResult:
    """Evaluate language models; print how well they predict, and what they write."""
    config = evaluate_language_model.EvaluateLanguageModelConfig(
        runs=tuple(runs),
        corpus=held_out_text(options),
        cache=options.cache,
        **options.model_dump(include=set(EvaluateOptions.model_fields)),
    )
    result = evaluate_language_model.run(
        config, on_step=lambda text: console.print(text, style="dim")
    )
    console.print(language_model_table(result, names))
    console.print(
        "perplexity: of a token; agrees: the teacher's most probable token is chosen; KL: from "
        "the teacher's distribution, mean nats of a position",
        style="dim",
    )
    for row in result.rows:
        if row.written is not None:
            name = (names or {}).get(row.name, row.name)
            console.print(f"{name}: {result.prompt}|{row.written}", soft_wrap=True)
    return result


def go_on(options: PredictSettings, run: Path, texts: Sequence[str], *, as_json: bool) -> None:
    """Print each text with what the model writes behind it.

    Args:
        options: how it writes.
        run: of the model.
        texts: to go on with.
        as_json: as JSON strings, so that each stays on one line.
    """
    check_generation(options)
    num_empty = sum(not text.strip() for text in texts)
    if num_empty:
        raise UserError(f"{num_empty} of {len(texts)} texts are empty: leave them out")
    model = load_student_language_model(run, options)
    for text in texts:
        whole = text + continuation(model, prompt_ids(model, text), options)
        print(json.dumps(whole, ensure_ascii=False) if as_json else whole)
