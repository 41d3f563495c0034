"""Reading a cache from each store, as ratios to Arrow: `python -m benchmarks.stores`.

One cache of random top-k fields (K = 64, 512 positions a sample) is written in both. `write`
commits it; `first pass` opens it and goes through all samples, which checks every byte; `random`
then takes samples in a shuffled order and reads their head's values, as training does. Files lie
in the page cache: the disk has no part in it.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.timing import interleaved
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import Manifest, SplitSummary, utc_now
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Fields, Ragged, language_model_schema
from teacher_cache.cache.stores.named import DEFAULT_STORE, STORES
from teacher_cache.cache.writer import CacheWriter

CODEC = TopKCodec(support_size=50_257, top_k=64)
SCHEMA = language_model_schema(CODEC.fields, is_packed=True)
POSITIONS = 512
SAMPLES_PER_SHARD = 256  # about 30 MB


def main(
    shards: Annotated[int, typer.Option(min=1, help="Shards of 256 samples, 30 MB each.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 7,
    seed: Annotated[int, typer.Option(help="Of the values and of the shuffled order.")] = 0,
) -> None:
    """Write, read through and read at random, in every store."""
    console = Console(width=120)
    described = machine.describe(torch.device("cpu"))
    console.print("; ".join(f"{name} {value}" for name, value in described.items() if value))
    parts = [_fields(np.random.default_rng([seed, shard])) for shard in range(shards)]
    with tempfile.TemporaryDirectory() as folder:
        caches = {store: Path(folder) / store for store in STORES}
        readers: dict[str, CacheReader] = {}

        def write(store: str) -> None:
            shutil.rmtree(caches[store], ignore_errors=True)
            _write(caches[store], store, parts)

        def first_pass(store: str) -> None:
            readers[store] = CacheReader(caches[store])
            for fields in readers[store].batches():
                assert len(fields["sample_id"])

        def at_random(store: str) -> None:
            reader = readers[store]
            for sample_idx in np.random.default_rng(seed).permutation(len(reader)):
                reader.sample(int(sample_idx))["topk_values"].sum()

        table = Table(title=f"{shards} shards of {SAMPLES_PER_SHARD} samples", title_justify="left")
        for heading in ("what", *(f"{store}, s" for store in STORES), "ratio to Arrow"):
            table.add_column(heading, justify="right")
        steps = {"write": write, "first pass": first_pass, "random": at_random}
        for name, step in steps.items():
            medians = _medians(step, repeats)
            ratios = (
                f"{medians[store] / medians[DEFAULT_STORE]:.2f}"
                for store in STORES
                if store != DEFAULT_STORE
            )
            table.add_row(name, *(f"{medians[store]:.3f}" for store in STORES), *ratios)
        console.print(table)


def _medians(step: Callable[[str], None], repeats: int) -> dict[str, float]:
    """Median seconds of a step in each store, after one run that is not timed."""
    for store in STORES:
        step(store)

    def timed(store: str) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            step(store)
            return time.perf_counter() - started

        return run

    times = interleaved({store: timed(store) for store in STORES}, dict.fromkeys(STORES, repeats))
    return {store: statistics.median(measured) for store, measured in times.items()}


def _fields(rng: np.random.Generator) -> Fields:
    num = SAMPLES_PER_SHARD * POSITIONS
    offsets = np.arange(SAMPLES_PER_SHARD + 1, dtype=np.int64) * POSITIONS
    fields: Fields = {"sample_id": np.frombuffer(rng.bytes(16 * SAMPLES_PER_SHARD), "V16")}
    for spec in SCHEMA[1:]:
        shape = (num, *spec.inner_shape)
        values = rng.integers(2, size=shape) if spec.dtype == "bool" else _random(rng, shape)
        fields[spec.name] = Ragged(values=values.astype(spec.dtype), offsets=offsets)
    return fields


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(250, size=shape, dtype=np.uint8)


def _write(cache: Path, store: str, parts: list[Fields]) -> None:
    plan = ShardPlan(
        num_documents=len(parts) * SAMPLES_PER_SHARD, documents_per_shard=SAMPLES_PER_SHARD
    )
    settings = {"task": "lm", "codec": CODEC.settings}
    manifest = Manifest(
        fingerprint=fingerprint(settings),
        settings=settings,
        layout={"documents_per_shard": SAMPLES_PER_SHARD},
        schema=SCHEMA,
        splits={
            "labeled": SplitSummary(
                num_documents=plan.num_documents, num_shards=len(plan), report={}
            )
        },
        about={},
        teacher_files={},
        versions={},
        created_at=utc_now(),
        store=store,
    )
    with CacheWriter(cache, manifest, {"labeled": plan}, overwrite=False) as writer:
        for split, shard_idx in writer.begin(lambda folder: folder.mkdir()):
            writer.commit(split, shard_idx, parts[shard_idx], num_truncated=0, environment={})
        writer.finish()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
