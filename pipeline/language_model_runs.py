"""What is done with trained language models: they are evaluated, and go on with a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.language_tables import language_model_table
from teacher_cache.pipeline.options import EvaluateCommandOptions, PredictSettings
from teacher_cache.pipeline.presets import held_out_text
from teacher_cache.pipeline.reporting import console
from teacher_cache.stages import evaluate_language_model as evaluation
from teacher_cache.stages.evaluation.config import EvaluateOptions
from teacher_cache.stages.evaluation.generation import check_generation, continuation, prompt_ids
from teacher_cache.stages.evaluation.language_model import load_student_language_model


def evaluate_language_models(
    options: EvaluateCommandOptions, runs: list[Path], names: dict[str, str] | None
) -> evaluation.EvaluateLanguageModelResult:
    """Evaluate language models; print how well they predict, and what they write."""
    config = evaluation.EvaluateLanguageModelConfig(
        runs=tuple(runs),
        corpus=held_out_text(options),
        cache=options.cache,
        **options.model_dump(include=set(EvaluateOptions.model_fields)),
    )
    result = evaluation.run(config, on_step=lambda text: console.print(text, style="dim"))
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
