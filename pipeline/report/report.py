"""What a report says: read from runs, the cache they were trained from, an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.confusion import Confusion
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest, read_manifest, utc_now
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.report.comparison import (
    BASELINES,
    TEACHER,
    Comparison,
    agreement_parts,
    cost_parts,
    disagreement_parts,
    label_parts,
    lead,
    result_parts,
)
from teacher_cache.pipeline.report.figures import heat_map
from teacher_cache.pipeline.report.page import (
    Cell,
    Code,
    Figure,
    Figures,
    Folded,
    Note,
    Part,
    Section,
    Table,
    of_terminal,
    page_of,
)
from teacher_cache.pipeline.report.reproduce import (
    changed_settings,
    evaluate_command,
    student_command,
)
from teacher_cache.pipeline.report.training import training_parts
from teacher_cache.pipeline.report.words import KNOWN, listed, percent, shown
from teacher_cache.pipeline.sample_view import attention_panels
from teacher_cache.pipeline.tables import (
    confusion_line,
    has_positions,
    kept_table,
    manifest_table,
    settings_table,
)
from teacher_cache.stages import evaluate as evaluation
from teacher_cache.stages.evaluation.runs import finished_run
from teacher_cache.stages.evaluation.task import EvaluateConfig
from teacher_cache.stages.training.run_folder import RunRecord, held_out_figures

REPORT_NAME = "report.html"
NUM_LOOKED_AT = 3  # tokens that are named of a row of a map

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report is made of; the command's options say more.

    Attributes:
        runs: finished students', or teachers'.
        cache: where the runs' cache lies now; None where they say.
        samples: ids whose attention maps are drawn; none for the cache's first.
        evaluation: file that `pipe evaluate --json` wrote; None for what the runs held out.
    """

    runs: Sequence[Path]
    cache: Path | None = None
    samples: Sequence[str] = ()
    evaluation: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All that a page is made of.

    Attributes:
        folders: of the runs, by name.
        records: of the runs, by name.
        cache: of all of them; None of teachers, and where it is not to be had.
        manifest: of it.
        without: why there is no cache.
        comparison: of the runs; None where they cannot be compared.
        not_compared: why.
    """

    folders: Mapping[str, Path]
    records: Mapping[str, RunRecord]
    cache: Path | None
    manifest: Manifest | None
    without: str | None
    comparison: Comparison | None
    not_compared: str | None


def write_report(options: ReportOptions, out: Path, say: Say | None = None) -> None:
    """Write the page.

    Args:
        options: what it is made of.
        out: the file.
        say: told what is being done.

    Raises:
        UserError: if a run is not finished, the cache or the evaluation that is named cannot be
            read, or the file cannot be written.
    """
    found = _sources(options, say or (lambda _: None))
    names = list(found.records)
    title = f"Run {names[0]}" if len(names) == 1 else f"{len(names)} runs compared"
    foot = f"Made by teacher-cache {version('teacher-cache')} at {utc_now()[:16]} UTC."
    text = page_of(title, _lead(found), list(sections(options, found)), foot)
    write_bytes_atomically(out, text.encode())


def sections(options: ReportOptions, found: Sources) -> Iterator[Section]:
    """The parts of the page, in the order of reading."""
    one = found.comparison
    yield Section(title="Result", name="result", parts=list(_result(found)))
    if one is not None:
        for title, name, parts in (
            ("Right and sure", "labels", label_parts(one)),
            ("Agreement with the teacher", "agreement", agreement_parts(one)),
            ("Where they disagree most", "disagreement", disagreement_parts(one)),
            ("Time and memory", "cost", cost_parts(one)),
        ):
            yield Section(title=title, name=name, parts=list(parts))
    yield Section(title="Training", name="training", parts=list(training_parts(found.records)))
    yield Section(title="Cache", name="cache", parts=list(_cache_parts(found)))
    yield Section(title="Attention", name="attention", parts=list(_attention(options, found)))
    yield Section(title="Make it again", name="again", parts=list(_again(found)))


def _sources(options: ReportOptions, say: Say) -> Sources:
    records = {folder: finished_run(folder) for folder in options.runs}
    folders = {folder.resolve().name: folder for folder in options.runs}
    if len(folders) < len(options.runs):
        raise UserError("the report names a run by its folder, and two have one name: rename one")
    short = short_names(list(folders))
    folders = {short[name]: folder for name, folder in folders.items()}
    named = {name: records[folder] for name, folder in folders.items()}
    are_students = {"cache_fingerprint" in one.settings for one in records.values()}
    if are_students == {False}:
        if options.cache is not None or options.samples:
            raise UserError(
                f"{options.runs[0]} is the run of a teacher, which was trained from no cache: "
                "leave out --cache and --sample"
            )
        return Sources(
            folders=folders,
            records=named,
            cache=None,
            manifest=None,
            without=None,
            comparison=None,
            not_compared=None,
        )
    if len(are_students) > 1:
        raise UserError("some of the runs are teachers' and some students': report them apart")
    cache, manifest, without = _cache_of(options, records)
    comparison, not_compared = None, without
    if options.evaluation is not None:
        comparison, not_compared = _read_evaluation(options.evaluation, named, short), None
    elif cache is not None:
        comparison, not_compared = _evaluated(folders, named, short, cache, say)
    return Sources(
        folders=folders,
        records=named,
        cache=cache,
        manifest=manifest,
        without=without,
        comparison=comparison,
        not_compared=not_compared,
    )


def _cache_of(
    options: ReportOptions, records: Mapping[Path, RunRecord]
) -> tuple[Path | None, Manifest | None, str | None]:
    """The runs' cache; or why there is none, where none is asked for."""
    fingerprints = {folder: one.settings["cache_fingerprint"] for folder, one in records.items()}
    if len(set(fingerprints.values())) > 1:
        reason = "the runs were trained from different caches"
        if options.cache is not None or options.samples:
            raise UserError(f"{reason}: leave out --cache and --sample, or report them apart")
        return None, None, f"{reason}; --evaluation FILE compares them on the same text"
    folder, fingerprint = next(iter(fingerprints.items()))
    cache = options.cache or Path(records[folder].about["cache"])
    try:
        manifest = read_manifest(cache)
    except UserError as reason:
        if options.cache is not None or options.samples:
            raise
        return None, None, f"{reason}. --cache names where it lies now"
    if manifest.fingerprint != fingerprint:
        raise UserError(
            f"{cache} is not the cache that {folder} was trained from (fingerprint "
            f"{manifest.fingerprint[:8]}, expected {fingerprint[:8]}): name that one with --cache"
        )
    return cache, manifest, None


def _evaluated(
    folders: Mapping[str, Path],
    records: Mapping[str, RunRecord],
    short: Mapping[str, str],
    cache: Path,
    say: Say,
) -> tuple[Comparison | None, str | None]:
    """The runs on what they held out of their cache; or why they cannot be."""
    try:
        config = EvaluateConfig(runs=tuple(folders.values()), cache=cache)
        result = evaluation.run(config, on_step=say)
    except UserError as reason:
        return None, f"the runs cannot be evaluated on their cache: {reason}"
    source = "of the cache, beside what the cache has of the teacher"
    # As the file has it.
    found = renamed(json.loads(json.dumps(result.to_json())), short)
    return _comparison(found, source, records), None


def _read_evaluation(
    path: Path, records: Mapping[str, RunRecord], short: Mapping[str, str]
) -> Comparison:
    """Of the file that `pipe evaluate` wrote; one row a model, the runs among them."""
    expected = "give one that `pipe evaluate RUN --json FILE` wrote"
    try:
        found = json.loads(path.read_text())
        rows = [dict(row) for row in found["rows"] if "name" in row]
        names = [str(row["name"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--evaluation {path} cannot be read ({error!r}): {expected}") from error
    missing = [name for name in short if name not in names]
    if missing:
        raise UserError(
            f"--evaluation {path} has the figures of {', '.join(names) or 'no model'}, and none of "
            f"{missing[0]}: {expected}"
        )
    chosen = (*short, TEACHER, *BASELINES)
    rows = [row for row in rows if row["name"] in chosen]
    found = renamed({**found, "rows": rows}, short)
    return _comparison(found, f"(figures of {path.name})", records)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Of several names what tells them apart: without the words with which all begin."""
    first, *others = ([*name.split("-")] for name in names)
    num = 0
    while others and all(len(one) > num + 1 for one in (first, *others)):
        if any(one[num] != first[num] for one in others):
            break
        num += 1
    short = {name: "-".join(name.split("-")[num:]) for name in names}
    taken = {TEACHER, *BASELINES} & set(short.values())
    return dict(zip(names, names, strict=True)) if taken else short


def renamed(found: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    """An evaluation with the runs' short names; what is of other runs is left out."""
    names = {**short, **{one: one for one in (TEACHER, *BASELINES)}}
    details = dict(found.get("details") or {})
    if details:
        details["models"] = {
            names[name]: one for name, one in details["models"].items() if name in names
        }
        details["differences"] = [
            {**one, "model": names[one["model"]], "other": names[one["other"]]}
            for one in details["differences"]
            if {one["model"], one["other"]} <= set(names)
        ]
    return {
        **found,
        "rows": [{**row, "name": names[row["name"]]} for row in found["rows"]],
        "marks": {names[one]: mark for one, mark in found.get("marks", {}).items() if one in names},
        "details": details,
    }


def _comparison(
    found: Mapping[str, Any], source: str, records: Mapping[str, RunRecord]
) -> Comparison:
    return Comparison(
        found=found,
        source=source,
        labels_only=[
            name
            for name, one in records.items()
            if one.settings.get("alpha") == 0 and not one.settings.get("unlabeled_alpha")
        ],
    )


def _lead(found: Sources) -> str:
    if found.comparison is not None and found.comparison.students:
        return lead(found.comparison)
    said = []
    for name, record in found.records.items():
        figures = {one: value for one, value in held_out_figures(record).items() if one in KNOWN}
        for one in ("accuracy", "micro_f1", "mse", "perplexity"):
            if one in figures:
                said.append(
                    f"{name}: {KNOWN[one].words.removesuffix(', %')} "
                    f"{shown(one, figures[one])}{' %' * KNOWN[one].is_percent}"
                )
    if not said:
        return "Nothing was held out of the training, so how good the result is was not measured."
    return f"On what the training held out: {'; '.join(said)}."


def _result(found: Sources) -> Iterator[Part]:
    if found.comparison is not None:
        yield from result_parts(found.comparison)
    elif found.not_compared is not None:
        yield Note(f"Teacher and student are not compared here: {found.not_compared}.")
    else:
        yield Note("The figures of a teacher stand under Training.")


def _cache_parts(found: Sources) -> Iterator[Part]:
    if found.without is not None:
        yield Note(f"Left out, with the attention maps: {found.without}.")
    if found.cache is None or found.manifest is None:
        return
    manifest = found.manifest
    yield of_terminal(manifest_table(manifest), "What the cache holds")
    confusion = Confusion.recorded(manifest)
    if confusion is not None:
        line = confusion_line(confusion, manifest.about["id2label"])
        yield Note(f"{line[0].upper()}{line[1:]}.")
    if has_positions(manifest):
        yield of_terminal(kept_table(manifest), "What it keeps of a token")
    yield _join_table(found)
    facts = [
        ("teacher", str(manifest.about.get("teacher", "–"))),
        ("fingerprint", manifest.fingerprint),
        ("made", f"{manifest.created_at[:16]} UTC"),
        ("format", manifest.store),
        *manifest.versions.items(),
    ]
    yield Folded(
        title="Where it comes from, and with which releases",
        of=[
            Table(
                caption="The cache's origin",
                headings=(),
                rows=[[Cell(name), Cell(value)] for name, value in facts],
                left=[1],
            ),
            of_terminal(settings_table(manifest.settings, ""), "Settings of the cache"),
        ],
    )


def _join_table(found: Sources) -> Table:
    """What the comparison of tokens found before each run."""
    rows = []
    for name, record in found.records.items():
        tokenization = record.about["tokenization"]
        result = (
            "the same tokens: verified"
            if tokenization == "verified"
            else f"trained although {listed(tokenization)} differed"
        )
        coverage = record.about.get("coverage")
        covered = (
            ""
            if coverage is None
            else ", ".join(
                f"{key.replace('_', ' ')} {value:.4g}"
                for key, value in coverage.items()
                if isinstance(value, int | float)
            )
        )
        rows.append([Cell(name), Cell(result, covered)])
    return Table(
        caption="Cache and student joined", headings=["run", "tokens"], rows=rows, left=[1]
    )


def _attention(options: ReportOptions, found: Sources) -> Iterator[Part]:
    cache = found.cache
    if cache is None or found.manifest is None:
        return
    if attention_from(found.manifest.settings) is None:
        if options.samples:
            raise UserError(
                f"--sample draws attention maps, and {cache} holds none: leave it out, or train "
                "from a cache made with `pipe cache-teacher --attention mean`"
            )
        return
    samples = options.samples or [next(iter(CacheReader(cache).sample_ids())).hex()]
    for name, folder in found.folders.items():
        run: Path | None = folder
        try:
            panels = [attention_panels(cache, one, run=run) for one in samples]
        except UserError as reason:
            # A pre-trained transformer, say, or a student that reads other tokens.
            yield Note(f"{name}: the teacher's maps alone: {reason}.")
            run = None
            panels = [attention_panels(cache, one) for one in samples]
        for sample_id, panel in zip(samples, panels, strict=True):
            sides = "Teacher's maps" if run is None else "Teacher's maps and mixing matrices"
            yield Note(f"{sides} of {name}, sample {sample_id}; tokens in the student's order.")
            yield Figures(
                of=[
                    _map_figure(one.title, one.values, panel.tokens, one.row_labels)
                    for one in panel.maps
                ]
            )


def _map_figure(
    title: str, values: np.ndarray, tokens: Sequence[str], row_labels: Sequence[str]
) -> Figure:
    looked_at = []
    for word, row in zip(row_labels, np.nan_to_num(values, nan=0.0), strict=True):
        order = np.argsort(-row, kind="stable")[:NUM_LOOKED_AT]
        said = ", ".join(f"{tokens[i]} {percent(float(row[i]))}" for i in order if row[i] > 0)
        looked_at.append([Cell(word), Cell(said)])
    return Figure(
        caption=f"{title[0].upper()}{title[1:]}: each row's shares, the largest the darkest.",
        svg=heat_map(values, tokens, row_labels),
        is_wide=True,
        values=Table(
            caption=f"{title}: what each row looks at most, %",
            headings=["row", "looks at"],
            rows=looked_at,
            left=[1],
        ),
    )


def _again(found: Sources) -> Iterator[Part]:
    if found.manifest is None and not all(
        "cache" in record.about for record in found.records.values()
    ):
        for name, record in found.records.items():
            table = of_terminal(settings_table(record.settings, ""), f"Settings of {name}")
            yield Folded(title=f"Settings of {name}", of=[table])
        return
    commands = [
        f"{student_command(found.folders[name], record)}  # {name}"
        for name, record in found.records.items()
    ]
    if found.cache is not None:
        commands.append(evaluate_command(list(found.folders.values()), found.cache))
    commands.append(f"pipe report {' '.join(map(str, found.folders.values()))}")
    yield Code(title="Commands", text="\n".join(commands))
    for name, record in found.records.items():
        changed = yaml.safe_dump({"train_student": changed_settings(record)}, sort_keys=True)
        table = of_terminal(settings_table(record.settings, ""), f"Settings of {name}")
        yield Folded(
            title=f"Configuration of {name}",
            of=[Code(title="What differs from the defaults, as YAML", text=changed), table],
        )
