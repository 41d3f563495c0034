"""Results as tables and as plain values for --json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from teacher_cache.cache.manifest import Manifest
from teacher_cache.stages.evaluate import EvaluateResult, Evaluation
from teacher_cache.stages.join.report import JoinReport

NONE = "–"


def join_table(report: JoinReport) -> Table:
    """Differences between cache and student."""
    table = Table(title="tokenization differs", title_justify="left")
    for name in ("compared", "cache", "student", "can be let pass"):
        table.add_column(name, overflow="fold")
    for one in report.differences:
        table.add_row(one.name, one.cache, one.student, "yes" if one.waivable else "no")
    return table


def evaluation_table(result: EvaluateResult, names: dict[str, str] | None = None) -> Table:
    """Teacher and students side by side.

    Args:
        result: of `stages.evaluate`.
        names: what to call a row, by its name.
    """
    table = Table(title=f"{result.num_documents:,} held-out documents", title_justify="left")
    lengths = sorted({n for row in result.rows for n in row.latency_ms or {}})
    table.add_column("model", overflow="fold")
    for heading in (*COLUMNS, *(f"ms at {length}" for length in lengths)):
        table.add_column(heading, justify="right")
    for row in result.rows:
        cells = [cell(row) for cell in COLUMNS.values()]
        cells += [_ms(row, length) for length in lengths]
        table.add_row((names or {}).get(row.name, row.name), *cells)
    return table


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _nats(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _ms(row: Evaluation, length: int) -> str:
    found = (row.latency_ms or {}).get(length)
    return NONE if found is None else f"{found:.1f}"


COLUMNS: dict[str, Callable[[Evaluation], str]] = {
    "accuracy %": lambda row: _percent(row.accuracy),
    "F1 %": lambda row: _percent(row.f1),
    "ECE %": lambda row: _percent(row.ece),
    "agrees with teacher %": lambda row: _percent(row.agreement),
    "KL to teacher": lambda row: _nats(row.kl),
    "parameters": lambda row: NONE
    if row.num_parameters is None
    else f"{row.num_parameters / 1e6:.1f} M",
    "MB": lambda row: NONE if row.megabytes is None else f"{row.megabytes:.1f}",
}


def manifest_table(manifest: Manifest) -> Table:
    """What a cache holds, split by split."""
    table = Table(title="splits", title_justify="left")
    table.add_column("split")
    headings = ("documents", "empty", "duplicates", "samples", "tokens", "cut", "shards", "MB")
    for heading in (*headings, "bytes a sample"):
        table.add_column(heading, justify="right")
    for name, split in manifest.splits.items():
        table.add_row(
            name,
            f"{split.num_documents:,}",
            f"{split.report['num_empty']:,}",
            f"{split.report['num_duplicates']:,}",
            f"{split.num_samples:,}",
            f"{split.num_tokens:,}",
            f"{split.num_truncated:,}",
            f"{split.num_shards:,}",
            f"{split.num_bytes / 1e6:,.2f}",
            f"{split.num_bytes / split.num_samples:,.0f}" if split.num_samples else NONE,
        )
    return table


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
