"""Results as tables and as plain values for --json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from teacher_cache.cache.manifest import Manifest, SplitSummary
from teacher_cache.cache.splits import viewed_split
from teacher_cache.stages.join.report import JoinReport

if TYPE_CHECKING:  # it imports torch
    from teacher_cache.stages.evaluate import EvaluateResult, Evaluation
    from teacher_cache.stages.evaluate_language_model import EvaluateLanguageModelResult
    from teacher_cache.stages.evaluation.language_model_rows import LanguageModelEvaluation

NONE = "–"


def join_table(report: JoinReport) -> Table:
    """Differences between cache and student."""
    table = Table(title="tokenization differs", title_justify="left")
    for name in ("compared", "cache", "student", "can be let pass"):
        table.add_column(name, overflow="fold")
    for one in report.differences:
        table.add_row(one.name, one.cache, one.student, "yes" if one.waivable else "no")
    return table


def quality_table(result: EvaluateResult, names: dict[str, str] | None = None) -> Table:
    """Teacher and students side by side: how well they classify.

    Args:
        result: of `stages.evaluate`.
        names: what to call a row, by its name.
    """
    table = Table(title=f"{result.num_documents:,} held-out documents", title_justify="left")
    table.add_column("model", overflow="fold", min_width=20)
    for heading in QUALITY:
        table.add_column(heading, justify="right")
    for row in result.rows:
        cells = [cell(row) for cell in QUALITY.values()]
        table.add_row((names or {}).get(row.name, row.name), *cells)
    return table


def cost_table(
    result: EvaluateResult | EvaluateLanguageModelResult, names: dict[str, str] | None = None
) -> Table:
    """Teacher and students side by side: size, and milliseconds for one document by length."""
    table = Table(title="size, and time for one document", title_justify="left")
    lengths = sorted({n for row in result.rows for n in row.latency_ms or {}})
    table.add_column("model", overflow="fold", min_width=20)
    for heading in ("parameters", "MB", *(f"ms at {length}" for length in lengths)):
        table.add_column(heading, justify="right")
    for row in result.rows:
        if row.num_parameters is not None and row.megabytes is not None:
            size = (f"{row.num_parameters / 1e6:.1f} M", f"{row.megabytes:.1f}")
            cells = [_ms(row, length) for length in lengths]
            table.add_row((names or {}).get(row.name, row.name), *size, *cells)
    return table


def evaluation_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Models of either task, a row each; a figure that no model has gets no column.

    Args:
        rows: figures by name, nested or not, each with the model's `name`.
        title: of the table.
    """
    leaves = [dict(_leaves(row)) for row in rows]
    columns = dict.fromkeys(
        name for row in leaves for name, value in row.items() if isinstance(value, int | float)
    )
    table = Table("model", title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in leaves:
        cells = (row.get(name) for name in columns)
        table.add_row(row["name"], *(NONE if one is None else f"{one:,.4g}" for one in cells))
    return table


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.1f}"


def nats(value: float | None) -> str:
    """To three places."""
    return NONE if value is None else f"{value:.3f}"


def _ms(row: Evaluation | LanguageModelEvaluation, length: int) -> str:
    found = (row.latency_ms or {}).get(length)
    return NONE if found is None else f"{found:.1f}"


QUALITY: dict[str, Callable[[Evaluation], str]] = {
    "accuracy %": lambda row: percent(row.accuracy),
    "F1 %": lambda row: percent(row.f1),
    "ECE %": lambda row: percent(row.ece),
    "agrees %": lambda row: percent(row.agreement),
    "KL": lambda row: nats(row.kl),
}


def manifest_table(manifest: Manifest) -> Table:
    """What a cache holds: a column for each corpus, and one for all views of it."""
    columns: dict[str, list[SplitSummary]] = {}
    for name, split in manifest.splits.items():
        viewed = viewed_split(name)
        columns.setdefault(f"views of {viewed}" if viewed else name, []).append(split)
    table = Table(title="what the cache holds", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for heading, count in COUNTS.items():
        cells = [sum(count(split) for split in splits) for splits in columns.values()]
        table.add_row(heading, *(f"{cell:,}" for cell in cells))
    for heading, size in SIZES.items():
        table.add_row(heading, *(size(splits) for splits in columns.values()))
    table.add_row("format", *(manifest.store for _ in columns))
    return table


def _bytes_a_sample(splits: list[SplitSummary]) -> str:
    num_samples = sum(split.num_samples for split in splits)
    return f"{_bytes(splits) / num_samples:,.0f}" if num_samples else NONE


def _bytes(splits: list[SplitSummary]) -> int:
    return sum(split.num_bytes for split in splits)


COUNTS: dict[str, Callable[[SplitSummary], int]] = {
    "documents": lambda split: split.num_documents,
    "empty (left out)": lambda split: split.report["num_empty"],
    # Reports of older releases, which knew no views, do not count these.
    "no such view (left out)": lambda split: split.report.get("num_unchanged", 0),
    "duplicates (kept)": lambda split: split.report["num_duplicates"],
    "samples": lambda split: split.num_samples,
    "cut at the maximum length": lambda split: split.num_truncated,
    "tokens": lambda split: split.num_tokens,
    "shards": lambda split: split.num_shards,
}
SIZES: dict[str, Callable[[list[SplitSummary]], str]] = {
    "MB": lambda splits: f"{_bytes(splits) / 1e6:,.2f}",
    "bytes a sample": _bytes_a_sample,
}


def settings_table(values: dict[str, Any], title: str) -> Table:
    """Nested settings, one leaf a line."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("setting")
    table.add_column("value", overflow="fold")
    for key, value in _leaves(values):
        table.add_row(key, str(value))
    return table


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
