"""Results as tables and as plain values for --json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.codecs.hidden import HIDDEN
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.confusion import ON_LABELS, Confusion
from teacher_cache.cache.manifest import Manifest, SplitSummary
from teacher_cache.cache.plan import viewed_split
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import NEXT_LOG_PROB, Schema, bytes_per_position
from teacher_cache.stages.join.report import JoinReport

if TYPE_CHECKING:  # they import torch
    from teacher_cache.pipeline.cache_figures import Distribution, SplitFigures
    from teacher_cache.pipeline.pushing import Upload
    from teacher_cache.stages.cache_teacher import Estimate
    from teacher_cache.stages.evaluate import EvaluateResult

NONE = "–"
NOT_PROBED = "not probed: teacher or data is not on this machine"
NOT_MEASURED_AGAIN = "not probed: the cache was converted, and the old one kept no logits"
NUM_SAMPLES = 64
BAR, WIDEST_BAR = "█", 32
MOST_CLASSES = 12  # that a table shows all pairs of


def _percent(value: float | None) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.1f}"


def _nats(value: float | None) -> str:
    """To three places."""
    return NONE if value is None else f"{value:.3f}"


def _bytes_a_sample(splits: list[SplitSummary]) -> str:
    num_samples = sum(split.num_samples for split in splits)
    return f"{_bytes(splits) / num_samples:,.0f}" if num_samples else NONE


def _bytes(splits: list[SplitSummary]) -> int:
    return sum(split.num_bytes for split in splits)


# What an evaluation shows: of a row's figure its name, and how it is printed.
QUALITY: dict[str, tuple[str, Callable[[Any], str]]] = {
    "positions": ("num_positions", "{:,}".format),
    "accuracy %": ("accuracy", _percent),
    "F1 %": ("f1", _percent),
    "ECE %": ("ece", _percent),
    "micro F1 %": ("micro_f1", _percent),
    "macro F1 %": ("macro_f1", _percent),
    "exact %": ("exact_match", _percent),
    "MSE": ("mse", _nats),
    "Pearson": ("pearson", _nats),
    "Spearman": ("spearman", _nats),
    "MSE to teacher": ("mse_to_teacher", _nats),
    "Pearson with teacher": ("pearson_with_teacher", _nats),
    "perplexity": ("perplexity", "{:,.2f}".format),
    "bits a byte": ("bits_per_byte", _nats),
    "agrees %": ("agreement", _percent),
    "KL": ("kl", _nats),
}
COUNTS: dict[str, Callable[[SplitSummary], int]] = {
    "documents": lambda split: split.num_documents,
    "empty (left out)": lambda split: split.report["num_empty"],
    # Reports of older releases, which knew no views, do not count these.
    "no such view (left out)": lambda split: split.report.get("num_unchanged", 0),
    "duplicates (kept)": lambda split: split.report["num_duplicates"],
    "without label": lambda split: split.report.get("num_without_label", 0),
    "samples": lambda split: split.num_samples,
    "cut at the maximum length": lambda split: split.num_truncated,
    "tokens": lambda split: split.num_tokens,
    "shards": lambda split: split.num_shards,
}
RARE = ("without label",)  # counts that are shown where there are any
SIZES: dict[str, Callable[[list[SplitSummary]], str]] = {
    "MB": lambda splits: f"{_bytes(splits) / 1e6:,.2f}",
    "bytes a sample": _bytes_a_sample,
}


def has_positions(manifest: Manifest) -> bool:
    """Whether a teacher spoke at the positions of a cache's samples, not once of each."""
    return any(spec.name == NEXT_LOG_PROB for spec in manifest.schema)


def join_table(report: JoinReport) -> Table:
    """Differences between cache and student."""
    table = Table(title="tokenization differs", title_justify="left")
    for name in ("compared", "cache", "student", "can be let pass"):
        table.add_column(name, overflow="fold")
    for one in report.differences:
        table.add_row(one.name, one.cache, one.student, "yes" if one.waivable else "no")
    return table


def quality_table(result: EvaluateResult, names: dict[str, str] | None = None) -> Table:
    """Teacher and students side by side: how well they predict.

    Args:
        result: of `stages.evaluate`; a figure that its rows do not have gets no column.
        names: what to call a row, by its name.
    """
    table = Table(title=f"{result.num_documents:,} held-out documents", title_justify="left")
    table.add_column("model", overflow="fold", min_width=20)
    columns = {
        heading: figure for heading, figure in QUALITY.items() if hasattr(result.rows[0], figure[0])
    }
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in result.rows:
        cells = [shown(getattr(row, name)) for name, shown in columns.values()]
        table.add_row((names or {}).get(row.name, row.name), *cells)
    return table


def cost_table(result: EvaluateResult, names: dict[str, str] | None = None) -> Table:
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


def _ms(row: Any, length: int) -> str:
    found = (row.latency_ms or {}).get(length)
    return NONE if found is None else f"{found:.1f}"


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
        if any(cells) or heading not in RARE:
            table.add_row(heading, *(f"{cell:,}" for cell in cells))
    for heading, size in SIZES.items():
        table.add_row(heading, *(size(splits) for splits in columns.values()))
    table.add_row("format", *(manifest.store for _ in columns))
    return table


def origin_table(manifest: Manifest) -> Table:
    """Where a cache comes from: teacher, text, temperatures, times, releases."""
    table = _table("where it comes from")
    about, settings = manifest.about, manifest.settings
    teacher = settings.get("teacher") or {}
    codec = settings.get("codec")
    rows = {
        "task": settings.get("task"),
        "teacher": about.get("teacher"),
        "architecture": teacher.get("architecture"),
        "number format": teacher.get("dtype"),
        "weights, SHA-256": teacher.get("weights_sha256"),
        "tokens of a sample, at most": settings.get("max_length"),
        "temperatures": codec.get("temperatures") if isinstance(codec, dict) else None,
        "converted from": about.get("converted_from"),
        "begun": manifest.created_at[:19].replace("T", " ") + " UTC",
        "made by": f"{manifest.maker}, "
        + ", ".join(f"{name} {release}" for name, release in manifest.versions.items()),
    }
    for name, source in (about.get("sources") or {}).items():
        table.add_row(f"{name} text", str(source))
    for name, value in rows.items():
        if value is not None:
            words = value if not isinstance(value, list) else ", ".join(f"{one:g}" for one in value)
            table.add_row(name, str(words))
    return table


def balance_table(confusion: Confusion, names: Mapping[str, str]) -> Table:
    """How many documents have each label, and how many of them the teacher gives it."""
    table = Table("label", title="labels", title_justify="left")
    for heading in ("documents", "share %", "teacher right %"):
        table.add_column(heading, justify="right")
    counts = confusion.counts.sum(axis=1)
    for label in np.argsort(-counts, kind="stable")[:MOST_CLASSES]:
        if counts[label]:
            right = float(confusion.counts[label, label] / counts[label])
            share = float(counts[label] / confusion.num)
            cells = (f"{counts[label]:,}", _percent(share), _percent(right))
            table.add_row(names[str(label)], *cells)
    return table


def distribution_tables(split: str, found: SplitFigures) -> list[Table]:
    """Lengths, confidence, captured mass as bars; bytes by field."""
    tables = [_bars(f"{split}: tokens of a sample", found.lengths, "{:,.0f}")]
    of = f"of {found.num_read:,} samples"
    if found.confidence is not None:
        tables.append(_bars(f"{split}: how sure the teacher is, {of}", found.confidence, "{:.2f}"))
    if found.captured_mass is not None:
        tables.append(_bars(f"{split}: captured mass", found.captured_mass, "{:.2f}"))
    table = _table(f"{split}: bytes a sample, {of}")
    for name, mean in found.bytes_per_sample.items():
        table.add_row(name, f"{mean:,.1f}")
    table.add_row("in all", f"{sum(found.bytes_per_sample.values()):,.1f}")
    return [*tables, table]


def _bars(title: str, found: Distribution, form: str) -> Table:
    """A histogram, the longest bar as wide as its column."""
    words = [form.format(one) for one in (found.mean, found.median, found.p95, found.largest)]
    table = Table(
        title=f"{title}: mean {words[0]}, median {words[1]}, 95 % up to {words[2]}, "
        f"at most {words[3]}",
        title_justify="left",
        show_header=False,
    )
    table.add_column("range", justify="right")
    table.add_column("number", justify="right")
    table.add_column("bar")
    most = max(num for _, _, num in found.bins)
    for low, high, num in found.bins:
        bar = BAR * max(1 if num else 0, round(WIDEST_BAR * num / most))
        table.add_row(f"{form.format(low)} – {form.format(high)}", f"{num:,}", bar)
    return table


def on_labels_line(manifest: Manifest) -> str | None:
    """How a teacher of other answers than a class does on the labels; None where none was measured.

    Args:
        manifest: of a cache.
    """
    found = dict(manifest.about.get(ON_LABELS) or {})
    if not found or "confusion" in found:
        return None
    num = found.pop("num_labeled")
    figures = ", ".join(
        f"{words.removesuffix(' %')} {show(found[name])}{' %' if words.endswith(' %') else ''}"
        for words, (name, show) in QUALITY.items()
        if name in found
    )
    return f"teacher against {num:,} labelled documents: {figures}"


def confusion_line(confusion: Confusion, names: Mapping[str, str]) -> str:
    """How often the teacher gives a document its label, and classes that no document has."""
    absent = [names[str(i)] for i in np.flatnonzero(confusion.counts.sum(axis=1) == 0)]
    without = f"; no document has the label {' or '.join(absent[:MOST_CLASSES])}" if absent else ""
    return (
        f"teacher against {confusion.num:,} labels: accuracy {_percent(confusion.accuracy)} %, by "
        f"chance {_percent(confusion.chance)} %{without}"
    )


def confusion_table(confusion: Confusion, names: Mapping[str, str]) -> Table:
    """What the teacher says of labelled documents, by label; its most frequent mistakes if many.

    Args:
        confusion: at least one document.
        names: of the classes, by id.
    """
    used = np.flatnonzero(confusion.counts.sum(axis=0) + confusion.counts.sum(axis=1))
    if len(used) > MOST_CLASSES:
        table = Table("label", "teacher")
        table.add_column("documents", justify="right")
        wrong = confusion.counts - np.diag(confusion.counts.diagonal())
        for flat in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CLASSES]:
            label, given = np.unravel_index(flat, wrong.shape)
            if wrong[label, given]:
                table.add_row(names[str(label)], names[str(given)], f"{wrong[label, given]:,}")
        return table
    table = Table("label")
    for given in used:
        table.add_column(f"teacher: {names[str(given)]}", justify="right")
    for label in used:
        cells = (f"{confusion.counts[label, given]:,}" for given in used)
        table.add_row(names[str(label)], *cells)
    return table


def uploads_table(uploads: Sequence[Upload]) -> Table:
    """What a push sends where; folders of a cache as one line each."""
    table = Table("repository", "file", title="to be sent", title_justify="left")
    table.add_column("MB", justify="right")
    for one in uploads:
        sizes: dict[str, int] = {}
        for name, content in one.files.items():
            shown = f"{name.split('/')[0]}/" if "/" in name else name
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            sizes[shown] = sizes.get(shown, 0) + size
        for name, size in sizes.items():
            table.add_row(f"{one.kind} {one.repo}", name, f"{size / 1e6:,.2f}")
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


def estimate_table(estimate: Estimate, *, of_codec: bool) -> Table:
    """Of a cache to be made; what is not known is not guessed.

    Args:
        estimate: of the cache.
        of_codec: whether a codec keeps what the teacher says, which takes bytes and loses some.
    """
    table = _table("estimated")
    if of_codec:
        per_token = NONE if estimate.bytes_per_token is None else f"{estimate.bytes_per_token:,.1f}"
        if estimate.bytes_per_token is not None and estimate.num_ids is None:
            per_token += " (if the teacher has at most 65,536 ids)"
        table.add_row("bytes a token", per_token)
    table.add_row("tokens", _counted(estimate.num_tokens))
    table.add_row("shards", _counted(estimate.num_shards))
    table.add_row("MB", _megabytes(estimate.num_bytes))
    if estimate.num_layer_bytes is None or estimate.num_layer_bytes:
        table.add_row("MB of maps and states of layers", _megabytes(estimate.num_layer_bytes))
    add_map_errors(table, estimate.maps)
    if of_codec:
        errors = (
            [] if estimate.codec_loss is None else estimate.codec_loss.to_json()["reconstruction"]
        )
        _add_errors(table, errors)
    return table


def kept_table(manifest: Manifest) -> Table:
    """Of a cache: bytes a token field by field, captured mass, what reconstruction loses."""
    table = _table("a token")
    probe = manifest.about.get("probe", {})
    errors = probe.get("reconstruction", [])
    # A head of differing sizes is as it was measured.
    entries = errors[0]["num_ids"] if errors else probe.get("num_ids") or 0.0
    for spec in manifest.schema:
        if spec.is_ragged and not spec.is_map:
            table.add_row(f"bytes of {spec.name}", f"{bytes_per_position((spec,), entries):,.2f}")
    total = bytes_per_position(manifest.schema, entries)
    table.add_row("bytes in all", f"{total:,.2f} ({codec_from(manifest.settings['codec']).name})")
    if "measured_against" in probe:
        _add_errors(
            table, errors, against=f", from {probe['measured_against']}", missing=NOT_MEASURED_AGAIN
        )
    else:
        _add_errors(table, errors)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("quantity")
    table.add_column("value", overflow="fold")
    return table


def _add_errors(
    table: Table, errors: list[dict[str, Any]], *, against: str = "", missing: str = NOT_PROBED
) -> None:
    """Rows of what a codec loses; `against` says from what, where that is not the teacher."""
    if not errors:
        table.add_row("reconstruction KL", missing)
        return
    first = errors[0]
    at = f"at temperature {first['temperature']:g}"
    for error in errors:
        if "coverage" in error:
            table.add_row(
                f"coverage of the student's ids at temperature {error['temperature']:g}",
                f"{error['coverage']:.4f}",
            )
    table.add_row(f"captured mass {at}", f"{1 - first['lost_mass']:.4f}")
    for error in errors:
        table.add_row(
            f"reconstruction KL{against} at temperature {error['temperature']:g}",
            f"{error['kl']:.2g} nats, at most {error['largest_kl']:.2g} "
            f"({error['num_positions']} positions)",
        )
    if "unused_mass" in first:
        table.add_row("mass of unused rows", f"{first['unused_mass']:.2g}")


def _megabytes(num_bytes: float | None) -> str:
    return NONE if num_bytes is None else f"{num_bytes / 1e6:,.1f}"


def _counted(number: float | None) -> str:
    return NONE if number is None else f"{number:,.0f}"


def layer_fields(manifest: Manifest) -> Schema:
    """The fields of maps and states, but for those that are the codec's own."""
    attention = attention_from(manifest.settings)
    maps = set() if attention is None else {spec.name for spec in attention.fields}
    asked = str(manifest.settings.get("hidden", "")).split(",")
    states = {HIDDEN} if "last" in asked else set()
    states |= {f"{HIDDEN}_{layer}" for layer in asked if layer.isdecimal()}
    return tuple(spec for spec in manifest.schema if spec.name in maps | states)


def layer_table(reader: CacheReader) -> Table:
    """Mean bytes a sample of each map and state, on samples evenly spaced over a split."""
    fields = layer_fields(reader.manifest)
    chosen = np.unique(np.linspace(0, len(reader) - 1, NUM_SAMPLES).astype(int))
    samples = [reader.sample(int(idx)) for idx in chosen]
    title = f"maps and states of layers, {len(samples)} samples"
    table = _table(title)
    for spec in fields:
        mean = np.mean([sample[spec.name].nbytes for sample in samples])
        table.add_row(f"bytes a sample of {spec.name}", f"{mean:,.0f}")
    every = [sum(sample[spec.name].nbytes for spec in fields) for sample in samples]
    table.add_row("bytes a sample in all", f"{np.mean(every):,.0f}")
    add_map_errors(table, reader.manifest.about.get("attention"))
    return table


def add_map_errors(table: Table, errors: Mapping[str, Any] | None) -> None:
    """What storing maps loses, as it was measured; no row where no maps are stored."""
    if errors is not None:
        table.add_row(
            "KL of an attention row",
            f"{errors['row_kl']:.2g} nats, at most {errors['largest_row_kl']:.2g} "
            f"({errors['num_rows']:,} rows)",
        )
