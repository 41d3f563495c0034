"""What a run's report says: read from the run, the cache it was trained from, an evaluation."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Table

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.pictures import (
    HELD_OUT,
    curves_figure,
    curves_of,
    is_clock,
    rendered,
)
from teacher_cache.pipeline.sample_view import attention_panels
from teacher_cache.pipeline.tables import evaluation_table, manifest_table, settings_table
from teacher_cache.stages.evaluation.runs import finished_run
from teacher_cache.stages.training.run_folder import RunRecord

REPORT_NAME = "report.html"
TEMPLATE = "page.html.jinja"
MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report is made of; the command's options say more.

    Attributes:
        run: a finished student's, or teacher's.
        cache: where the run's cache lies now; None where the run says.
        samples: ids whose attention maps are drawn; none for the cache's first.
        evaluation: file that `pipe evaluate --json` wrote; or none.
    """

    run: Path
    cache: Path | None = None
    samples: Sequence[str] = ()
    evaluation: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture, which lies in the page itself.

    Attributes:
        caption: what it shows.
        kind: png or svg.
        data: of the file.
    """

    caption: str
    kind: str
    data: bytes

    @property
    def uri(self) -> str:
        """The whole file as an address."""
        return f"data:{MEDIA_TYPES[self.kind]};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: above it.
        notes: sentences.
        tables: as the terminal shows them.
        pictures: behind the tables.
    """

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def write_report(options: ReportOptions, out: Path) -> None:
    """Write the page.

    Raises:
        UserError: if the run is not finished, the cache or the evaluation that is named cannot be
            read, matplotlib is missing, or the file cannot be written.
    """
    record = finished_run(options.run)
    text = page_of(f"Run {options.run.resolve().name}", list(sections(options, record)))
    write_bytes_atomically(out, text.encode())


def sections(options: ReportOptions, record: RunRecord) -> Iterator[Section]:
    """The parts of the page, in the order of reading.

    Args:
        options: what it is made of.
        record: of the run.
    """
    result = record.result or {}
    yield Section(title="Training", tables=[settings_table(_ended(result) | record.about, "")])
    held_out = result.get("evaluation")
    if held_out:
        figures = {
            name.removeprefix(HELD_OUT): value
            for name, value in held_out.items()
            if name.startswith(HELD_OUT) and not is_clock(name)
        }
        rows = [{"name": f"step {held_out['step']}", **figures}]
        table = evaluation_table(rows, "samples of the cache that were held out of training")
        yield Section(title="Held out", tables=[table])
    if options.evaluation is not None:
        rows = _rows(options.evaluation, options.run)
        yield Section(
            title="Evaluation", tables=[evaluation_table(rows, "as pipe evaluate measured")]
        )
    panels = curves_of(result.get("log", ()))
    if panels:
        picture = rendered(curves_figure(panels), "svg")
        caption = "Each logged figure over the optimizer's steps."
        yield Section(title="Curves", pictures=[Picture(caption=caption, kind="svg", data=picture)])
    if "cache_fingerprint" in record.settings:
        yield from _cache_sections(options, record)
    elif options.cache is not None or options.samples:
        raise UserError(
            f"{options.run} is the run of a teacher, which was trained from no cache: leave out "
            "--cache and --sample"
        )
    yield Section(title="Settings", tables=[settings_table(record.settings, "")])


def _ended(result: dict[str, Any]) -> dict[str, Any]:
    """What is short of a run's result: steps, seconds and the like."""
    return {
        name: value
        for name, value in result.items()
        if value is not None and not isinstance(value, dict | list)
    }


def _rows(path: Path, run: Path) -> list[dict[str, Any]]:
    """Of the file that `pipe evaluate` wrote; one a model, the run among them."""
    expected = "give one that `pipe evaluate RUN --json FILE` wrote"
    try:
        rows = json.loads(path.read_text())["rows"]
        named = [dict(row) for row in rows if "name" in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--evaluation {path} cannot be read ({error!r}): {expected}") from error
    names = [str(row["name"]) for row in named]
    if not {run.name, run.resolve().name} & set(names):
        raise UserError(
            f"--evaluation {path} has the figures of {', '.join(names) or 'no model'}, and none of "
            f"{run}: {expected}"
        )
    return named


def _cache_sections(options: ReportOptions, record: RunRecord) -> Iterator[Section]:
    cache = options.cache or Path(record.about["cache"])
    try:
        manifest = read_manifest(cache)
    except UserError as reason:
        if options.cache is not None or options.samples:
            raise
        note = f"Left out, with the attention maps: {reason}. --cache names where it lies now."
        yield Section(title="Cache", notes=[note])
        return
    if manifest.fingerprint != record.settings["cache_fingerprint"]:
        raise UserError(
            f"{cache} is not the cache that {options.run} was trained from (fingerprint "
            f"{manifest.fingerprint[:8]}, expected {record.settings['cache_fingerprint'][:8]}): "
            "name that one with --cache"
        )
    yield Section(
        title="Cache",
        tables=[manifest_table(manifest), settings_table(manifest.settings, "settings")],
    )
    yield _attention_section(options, cache, manifest)


def _attention_section(options: ReportOptions, cache: Path, manifest: Manifest) -> Section:
    title = "Attention"
    if attention_from(manifest.settings) is None:
        if options.samples:
            raise UserError(
                f"--sample draws attention maps, and {cache} holds none: leave it out, or train "
                "from a cache made with `pipe cache-teacher --attention mean`"
            )
        return Section(title=title, notes=["The cache holds no attention maps."])
    samples = options.samples or [next(iter(CacheReader(cache).sample_ids())).hex()]
    notes: list[str] = []
    run: Path | None = options.run
    try:
        panels = [attention_panels(cache, one, run=run) for one in samples]
    except UserError as reason:
        # A pre-trained transformer, say, or a student that reads other tokens.
        run, notes = None, [f"The teacher's maps alone: {reason}."]
        panels = [attention_panels(cache, one) for one in samples]
    sides = "Teacher's maps" if run is None else "Teacher's maps and student's mixing matrices"
    pictures = [
        Picture(
            caption=f"{sides}, sample {sample_id}",
            kind="png",
            data=rendered(one.figure(), "png"),
        )
        for sample_id, one in zip(samples, panels, strict=True)
    ]
    return Section(title=title, notes=notes, pictures=pictures)


def page_of(title: str, sections: Sequence[Section]) -> str:
    """The whole page; every text is escaped.

    Args:
        title: of the page.
        sections: in the order of reading.
    """
    # Always: jinja's own choice goes by the ending of a file's name, and a string has none.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files(__package__ or "").joinpath(TEMPLATE).read_text(encoding="utf-8")
    shown = [
        {
            "title": one.title,
            "notes": one.notes,
            "tables": [_words(table) for table in one.tables],
            "pictures": one.pictures,
        }
        for one in sections
    ]
    return environment.from_string(source).render(title=title, sections=shown)


def _words(table: Table) -> dict[str, object]:
    """A terminal's table as words."""
    columns = table.columns
    return {
        "title": str(table.title or ""),
        "headings": [str(one.header) for one in columns] if table.show_header else [],
        "numeric": [one.justify == "right" for one in columns],
        "rows": list(zip(*([str(cell) for cell in one.cells] for one in columns), strict=True)),
    }
