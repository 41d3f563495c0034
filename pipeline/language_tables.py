"""What a person sees of a language model's cache: bytes a token, what is kept, what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.schema import bytes_per_position
from teacher_cache.pipeline.layer_tables import add_map_errors
from teacher_cache.pipeline.tables import NONE, nats, percent

if TYPE_CHECKING:  # it imports torch
    from teacher_cache.stages.estimate import Estimate
    from teacher_cache.stages.evaluate_language_model import EvaluateLanguageModelResult

NOT_PROBED = "not probed: teacher or data is not on this machine"
NOT_PROBED_AGAIN = "not probed: the cache was converted, and the old one kept no logits"


def is_language_model(manifest: Manifest) -> bool:
    """Whether a cache is one of a language model."""
    return manifest.settings["task"] == "lm"


def estimate_table(estimate: Estimate, *, is_language_model: bool) -> Table:
    """Of a cache to be made; what is not known is not guessed."""
    table = _table("estimated")
    if is_language_model:
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
    if is_language_model:
        errors = [] if estimate.probe is None else estimate.probe.to_json()["reconstruction"]
        _add_errors(table, errors)
    return table


def kept_table(manifest: Manifest) -> Table:
    """Of a cache: bytes a token field by field, captured mass, what reconstruction loses."""
    table = _table("a token")
    probe = manifest.about.get("probe", {})
    errors = probe.get("reconstruction", [])
    # A head of differing sizes is as the probe found it.
    entries = errors[0]["num_ids"] if errors else probe.get("num_ids") or 0.0
    for spec in manifest.schema:
        if spec.is_ragged and not spec.is_map:
            table.add_row(f"bytes of {spec.name}", f"{bytes_per_position((spec,), entries):,.2f}")
    total = bytes_per_position(manifest.schema, entries)
    table.add_row("bytes in all", f"{total:,.2f} ({codec_from(manifest.settings['codec']).name})")
    if "measured_against" in probe:
        _add_errors(
            table, errors, against=f", from {probe['measured_against']}", missing=NOT_PROBED_AGAIN
        )
    else:
        _add_errors(table, errors)
    return table


def language_model_table(
    result: EvaluateLanguageModelResult, names: dict[str, str] | None = None
) -> Table:
    """Teacher and students side by side: how well they predict the next token.

    Args:
        result: of `stages.evaluate_language_model`.
        names: what to call a row, by its name.
    """
    table = Table(title=f"{result.num_documents:,} held-out documents", title_justify="left")
    table.add_column("model", overflow="fold", min_width=20)
    for heading in ("positions", "perplexity", "bits a byte", "agrees %", "KL"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            (names or {}).get(row.name, row.name),
            f"{row.num_positions:,}",
            f"{row.perplexity:,.2f}",
            nats(row.bits_per_byte),
            percent(row.agreement),
            nats(row.kl),
        )
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
