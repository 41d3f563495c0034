"""The documents' commands exist, and their programs run or are those that other tests run."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import typer.main

from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.cli import app
from tests.integration.test_imdb_stand_in import PLAIN_READER
from tests.small_caches import write_cache

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STUDENT = (ROOT / "docs" / "student.md").read_text()
RECIPE = (ROOT / "docs" / "recipe.md").read_text()
CODECS = (ROOT / "docs" / "codecs.md").read_text()
LANGUAGE_MODELS = (ROOT / "docs" / "language-models.md").read_text()
ZARR = (ROOT / "docs" / "zarr.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
CACHE = (ROOT / "docs" / "cache.md").read_text()
TRANSFER = (ROOT / "docs" / "transfer.md").read_text()
DOCS = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def _pipe_lines() -> list[str]:
    found = re.findall(
        r"(?:^    |`|\./)(?:\.venv/bin/)?pipe ([a-z-]+[^`\n#]*)",
        README + DOCS,
        re.MULTILINE,
    )
    return [line.strip() for line in found]


def test_the_program_is_the_one_that_is_tested() -> None:
    assert textwrap.indent(PLAIN_READER.rstrip(), "    ") in CACHE


@pytest.mark.parametrize("line", _pipe_lines())
def test_every_command_and_option_exists(line: str) -> None:
    name, *words = line.split()
    assert name in COMMANDS, line
    known = {option for one in COMMANDS[name].params for option in (*one.opts, *one.secondary_opts)}
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= known, line


def test_every_option_of_the_tables_is_one_of_its_stage() -> None:
    stages = {"cache-teacher": LANGUAGE_MODELS, "train-student": TRAINING + TRANSFER}
    for stage, text in stages.items():
        known = {option for one in COMMANDS[stage].params for option in one.opts}
        rows = [line for line in text.splitlines() if line.startswith("| `--")]
        named = {option for row in rows for option in re.findall(r"`(--[a-z-]+)`", row)}
        assert named and named <= known


def test_there_are_commands_to_check() -> None:
    assert len(_pipe_lines()) >= 10


def test_the_weights_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = STUDENT.index("    from pathlib import Path\n")
    program = textwrap.dedent(STUDENT[start : STUDENT.index("\n\n", start)])
    assert "to_transformers" in program and "assert torch.equal" in program
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    exec(compile(program, "docs/student.md", "exec"), {})


@pytest.mark.parametrize("library", ["zarr", "xarray"])
def test_the_zarr_programs_print_what_is_in_the_cache(
    tmp_path: Path,
    library: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = ZARR.index(f"    import sys\n    from pathlib import Path\n    import {library}\n")
    program = textwrap.dedent(ZARR[start : ZARR.index("\n\n", start)])
    write_cache(tmp_path, 6, 3, store="zarr")
    monkeypatch.setattr("sys.argv", ["program", str(tmp_path)])
    exec(compile(program, "docs/zarr.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    wanted = [
        f"{sample['input_ids'].tolist()} {sample['class_logits'].tolist()}"
        for reader in (CacheReader(tmp_path, split) for split in ("labeled", "unlabeled"))
        for sample in map(reader.sample, range(len(reader)))
    ]
    assert len(printed) == len(wanted) > 5
    assert all(line.endswith(one) for line, one in zip(printed, wanted, strict=True))


def test_the_students_speeds_are_those_of_the_benchmark() -> None:
    printed = (ROOT / "benchmarks" / "results" / "scan.txt").read_text()
    rows = [line for line in STUDENT.splitlines() if re.match(r"\| \d × [\d,]+ \|", line)]
    assert rows
    for row in rows:
        shape, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for number in (re.match(r"[\d.]+", cell) for cell in cells):
            assert number is None or number[0] in printed, (shape, number[0])


def test_the_codecs_tables_are_those_of_the_benchmark() -> None:
    printed = (ROOT / "benchmarks" / "results" / "codecs.md").read_text().splitlines()
    rows = [line for line in CODECS.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        assert row in printed, row


def test_the_recipes_figures_are_those_of_the_benchmark() -> None:
    """Whole lines in docs/recipe.md; in the README, each row's numbers."""
    printed = (ROOT / "benchmarks" / "results" / "quality.md").read_text()
    rows = [line for line in RECIPE.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and all(row in printed.splitlines() for row in rows)
    start = README.index("## What each part gives")
    section = README[start : README.index("\n## ", start)]
    rows = [line for line in section.splitlines() if re.match(r"\| [a-z+]", line)][1:]
    assert len(rows) > 5
    for row in rows:
        for number in re.findall(r"[+-]?\d+\.\d", row):
            assert number in printed, (row, number)


def test_the_readme_is_short() -> None:
    """What it is, the first steps, one's own data, and where to read on."""
    assert len(README.splitlines()) <= 200
