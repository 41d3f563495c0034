"""What a person sees of a cache's attention maps and hidden states: bytes field by field, loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.codecs.hidden import HIDDEN
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Schema

NUM_SAMPLES = 64


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
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("quantity")
    table.add_column("value", overflow="fold")
    for spec in fields:
        mean = np.mean([sample[spec.name].nbytes for sample in samples])
        table.add_row(f"bytes a sample of {spec.name}", f"{mean:,.0f}")
    every = [sum(sample[spec.name].nbytes for spec in fields) for sample in samples]
    table.add_row("bytes a sample in all", f"{np.mean(every):,.0f}")
    add_map_errors(table, reader.manifest.about.get("attention"))
    return table


def add_map_errors(table: Table, errors: Mapping[str, Any] | None) -> None:
    """What storing maps loses, as the probe found it; no row where no maps are stored."""
    if errors is not None:
        table.add_row(
            "KL of an attention row",
            f"{errors['row_kl']:.2g} nats, at most {errors['largest_row_kl']:.2g} "
            f"({errors['num_rows']:,} rows)",
        )
