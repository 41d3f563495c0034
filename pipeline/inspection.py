"""`pipe inspect` and `pipe verify`: what a cache holds and whether it is sound; without torch."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from rich.progress import Progress

from teacher_cache.cache.committed import what_is_missing
from teacher_cache.cache.confusion import ON_LABELS, Confusion
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify as verify_cache
from teacher_cache.pipeline.cache_figures import SplitFigures, figures_of, to_json
from teacher_cache.pipeline.pictures import write_figure
from teacher_cache.pipeline.reporting import console, working
from teacher_cache.pipeline.sample_view import NUM_POSITIONS, attention_panels, print_sample
from teacher_cache.pipeline.tables import (
    balance_table,
    confusion_line,
    confusion_table,
    distribution_tables,
    has_positions,
    kept_table,
    layer_fields,
    layer_table,
    manifest_table,
    on_labels_line,
    origin_table,
    settings_table,
)

NUM_IDS_SHOWN = 3


def inspect(
    cache: Path,
    *,
    sample: str | None,
    attention_image: Path | None,
    run: Path | None,
    as_json: bool,
) -> None:
    """Print what a cache holds, or one of its samples; or draw the sample's attention maps.

    Raises:
        UserError: if there is no cache, or no such sample, or no maps to draw.
    """
    manifest = read_manifest(cache)
    if run is not None and attention_image is None:
        raise UserError(
            "--run draws a student's mixing matrices beside its teacher's maps: give the picture's "
            "file with --attention-image, and --sample"
        )
    if attention_image is not None:
        if sample is None or as_json:
            raise UserError(
                "--attention-image draws one sample: give its id with --sample, and no --json"
            )
        panels = attention_panels(cache, sample, run=run)
        write_figure(panels.figure(), attention_image, option="--attention-image")
        console.print(f"✓ attention maps drawn: {attention_image}", style="green", soft_wrap=True)
        return
    if as_json:
        _print_json(cache, manifest)
        return
    if sample is not None:
        print_sample(console, cache, sample)
        return
    state = "complete" if manifest.complete else "NOT complete"
    console.print(f"cache {cache}: {state}; fingerprint {manifest.fingerprint}", soft_wrap=True)
    if not manifest.complete:
        console.print(f"! {what_is_missing(cache, manifest)}", style="yellow", soft_wrap=True)
    console.print(origin_table(manifest))
    console.print(manifest_table(manifest))
    if has_positions(manifest):
        console.print(kept_table(manifest))
    if manifest.complete:
        _print_measured(cache, manifest)
    about = {name: one for name, one in manifest.about.items() if name != ON_LABELS}
    console.print(settings_table(manifest.settings | {"about": about}, "settings"))
    shapes = [f"{one.name} {one.dtype}{list(one.shape) or ''}" for one in manifest.schema]
    console.print("fields of a sample: " + ", ".join(shapes), soft_wrap=True)
    if manifest.complete:
        _print_first(cache, manifest)


def _print_json(cache: Path, manifest: Manifest) -> None:
    """The manifest, and under `measured` what it does not hold."""
    value = json.loads((cache / MANIFEST_NAME).read_text())
    if manifest.complete:
        value["measured"] = to_json(_measured(cache, manifest))
    console.print_json(json.dumps(value))


def _measured(cache: Path, manifest: Manifest) -> dict[str, SplitFigures]:
    """Figures of each split that holds samples."""
    found = {split: figures_of(CacheReader(cache, split)) for split in manifest.splits}
    return {split: one for split, one in found.items() if one is not None}


def _print_measured(cache: Path, manifest: Manifest) -> None:
    """What labels and samples say."""
    reader = CacheReader(cache)
    confusion = Confusion.recorded(manifest) or Confusion.counted(manifest, reader.batches())
    if confusion is not None:
        names = manifest.about["id2label"]
        console.print(balance_table(confusion, names))
        console.print(confusion_line(confusion, names), soft_wrap=True)
        console.print(confusion_table(confusion, names))
        if fits := confusion.fitting():
            means = ", ".join(f"{names[str(i)]} is {names[str(j)]}" for i, j in fits.items())
            console.print(f"! the teacher's ids seem to mean: {means}", style="yellow")
    line = on_labels_line(manifest)
    if line is not None:
        console.print(line, soft_wrap=True)
    found = _measured(cache, manifest)
    for split, one in found.items():
        for table in distribution_tables(split, one):
            console.print(table)
    for split in found if layer_fields(manifest) else ():
        console.print(layer_table(CacheReader(cache, split)))
        break


def _print_first(cache: Path, manifest: Manifest) -> None:
    """Some ids of each split, and the first sample there is."""
    shown = None
    for split in manifest.splits:
        ids = [one.hex() for one in islice(CacheReader(cache, split).sample_ids(), NUM_IDS_SHOWN)]
        shown = shown or (ids[0] if ids else None)
        console.print(f"first {split} samples: {', '.join(ids)}", soft_wrap=True)
    if shown is not None:
        print_sample(console, cache, shown, most=NUM_POSITIONS)


def verify(cache: Path, *, deep: int, teacher: str | None, trust_remote_code: bool) -> None:
    """Check every byte, and with `deep` some logits.

    Raises:
        UserError: if there is no cache.
        CheckFailed: if anything differs from what was recorded; what it is stands above.
    """
    manifest = read_manifest(cache)
    total = sum(split.num_shards for split in manifest.splits.values())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("verify", total=total)
        report = verify_cache(cache, on_shard=lambda _: progress.advance(task))
    for problem in report.problems:
        console.print(f"✗ {problem}", style="red", soft_wrap=True)
    if report.problems:
        counted = "a problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise CheckFailed(
            f"{cache} has {counted}: run the `{manifest.maker}` that made it again, it rebuilds "
            "what is damaged and nothing else"
        )
    checked = f"{report.num_shards:,} shards, {report.num_bytes / 1e6:,.2f} MB"
    console.print(f"✓ {cache} is sound: {checked}", style="green")
    if deep:
        from teacher_cache.stages.verify import verify_deep  # imports torch

        with working(console, "running the teacher again"):
            worst = verify_deep(cache, deep, teacher=teacher, trust_remote_code=trust_remote_code)
        console.print(f"✓ {_found(read_manifest(cache), worst)}", style="green")


def _found(manifest: Manifest, worst: float) -> str:
    layers = ", ".join(spec.name for spec in layer_fields(manifest))
    besides = f"; {layers} within what their rounding allows" if layers else ""
    if has_positions(manifest):
        return f"distributions as cached: largest KL of a position {worst:.2g} nats{besides}"
    return f"logits as cached: largest difference {worst:.2g}{besides}"
