"""The command line: each command resolves its configuration and calls one function.

Whatever is slow to import (torch, transformers, datasets) is imported inside a command.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    CheckOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
    ImportOptions,
    PredictOptions,
    PredictSettings,
)
from teacher_cache.pipeline.reporting import console, quiet_libraries, reported
from teacher_cache.pipeline.settings import Model, argument, resolve, switch, value, with_options
from teacher_cache.stages.codecs.config import ConvertOptions
from teacher_cache.stages.training.config import TrainStudentConfig

SECTIONS = (
    *("finetune_teacher", "cache_teacher", "convert", "import_log_probs"),
    *("train_student", "students", "evaluate"),
)

# What a person wants to do, in the order in which it is done.
MAKING = "Make a cache"
TRAINING = "Train students from it"
LOOKING = "Look at what there is"
USING = "Use a student"

CacheFolder = Annotated[Path, typer.Argument(help="Folder of the cache.")]

app = typer.Typer(
    help="Run a transformer teacher once, cache its logits, distil Mamba students from the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `pipe`."""
    app()


def _resolve(model: type[Model], section: str, given: dict[str, Any]) -> Model:
    return resolve(model, section=section, sections=SECTIONS, **given)


def _command(name: str, group: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return app.command(name, rich_help_panel=group)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"teacher-cache {version('teacher-cache')}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """What stands before any command."""


@_command("finetune-teacher", MAKING)
@with_options(FinetuneTeacherOptions)
def finetune_teacher(**given: Any) -> None:
    """Fine-tune a base encoder or decoder into a classification teacher."""
    with reported(in_processes=True):
        options = _resolve(FinetuneTeacherOptions, "finetune_teacher", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.finetune_teacher(options)


@_command("cache-teacher", MAKING)
@with_options(
    CacheTeacherOptions,
    leading=[switch("dry_run", "Print what would run, resolved, and stop; needs no network.")],
)
def cache_teacher(*, dry_run: bool, **given: Any) -> None:
    """Stage one: run the teacher once and cache its logits; resumes where it was killed."""
    with reported(in_processes=True):
        options = _resolve(CacheTeacherOptions, "cache_teacher", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.cache_teacher(options, dry_run=dry_run)


@_command("train-student", TRAINING)
@with_options(TrainStudentConfig)
def train_student(**given: Any) -> None:
    """Stage two: train a student from the cache alone; resumes where it was killed."""
    with reported(in_processes=True):
        config = _resolve(TrainStudentConfig, "train_student", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.train_student(config)


@_command("check", TRAINING)
@with_options(CheckOptions)
def check(**given: Any) -> None:
    """Compare a cache's tokenization with a student's; exit 1 on a mismatch."""
    with reported():
        config = _resolve(TrainStudentConfig, "train_student", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.check(config)


@_command("inspect", LOOKING)
def inspect(
    cache: CacheFolder,
    sample: Annotated[
        str | None, typer.Option(help="Id of a sample to show whole (or the start of one).")
    ] = None,
    attention_image: Annotated[
        Path | None,
        typer.Option(
            help="Draw the attention maps of --sample, its tokens on the axes, into this file "
            "(png, pdf, svg, ...)."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a student's run: --attention-image draws its mixing matrices beside "
            "the teacher's maps, each matched layer's two panels in the student's order."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print manifest and figures as JSON.")
    ] = False,
) -> None:
    """Show what a cache holds: origin, sizes, lengths, confidence, one decoded sample."""
    with reported():
        from teacher_cache.pipeline import inspection

        quiet_libraries()
        inspection.inspect(
            cache, sample=sample, attention_image=attention_image, run=run, as_json=as_json
        )


@_command("convert", MAKING)
@with_options(
    ConvertOptions,
    leading=[
        argument("cache", Path, "Folder of the cache to read, a complete one."),
        argument("out", Path, "Folder of the new cache."),
    ],
)
def convert(*, cache: Path, out: Path, **given: Any) -> None:
    """Write a cache again in another format or codec; resumes where it was killed.

    A codec that stays keeps what is not given; another one takes the defaults below.
    """
    with reported():
        options = _resolve(ConvertOptions, "convert", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.convert(options, cache, out)


@_command("import-log-probs", MAKING)
@with_options(
    ImportOptions,
    leading=[
        argument("answers", Path, "Answers (jsonl, parquet), or logits that llama.cpp saved."),
        argument("out", Path, "Folder of the cache."),
    ],
)
def import_log_probs(*, answers: Path, out: Path, **given: Any) -> None:
    """Make a cache of what an inference engine said; resumes where it was killed."""
    with reported():
        options = _resolve(ImportOptions, "import_log_probs", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.import_log_probs(options, answers, out)


@_command("verify", LOOKING)
def verify(
    cache: CacheFolder,
    deep: Annotated[
        int, typer.Option(min=0, help="Also run the teacher again on so many samples.")
    ] = 0,
    teacher: Annotated[
        str | None, typer.Option(help="Where the teacher lies now, for --deep.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the model code that the teacher's repository brings.")
    ] = False,
) -> None:
    """Check every byte of a cache against its checksums; exit 1 on damage."""
    with reported():
        from teacher_cache.pipeline import inspection

        quiet_libraries()
        inspection.verify(cache, deep=deep, teacher=teacher, trust_remote_code=trust_remote_code)


@_command("evaluate", LOOKING)
@with_options(
    EvaluateCommandOptions,
    leading=[
        argument("runs", list[Path], "Folders of trained students."),
        value("json", Path, "Also write the figures to this file."),
    ],
)
def evaluate(*, runs: list[Path], json: Path | None, **given: Any) -> None:
    """Compare students with their teacher on documents that neither has seen."""
    with reported():
        options = _resolve(EvaluateCommandOptions, "evaluate", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.evaluate(options, runs, json_file=json)


@_command("predict", USING)
@with_options(
    PredictOptions,
    leading=[
        argument("run", Path, "Folder of a trained student."),
        argument(
            "text",
            str,
            "Text to classify or go on with, of a pair the first (--second); - reads one a line.",
            "-",
        ),
    ],
)
def predict(*, run: Path, text: str, **given: Any) -> None:
    """Classify text with a trained student, or let a language model go on with it."""
    with reported():
        options = _resolve(PredictSettings, "evaluate", given)
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.predict(options, run, text)


@_command("export", USING)
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    out: Annotated[Path, typer.Argument(help="The file to write, or the folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="transformers, a folder that it loads without this package (a classifier's with "
            "code of its own); mamba-ssm, such a folder of a language model; gguf, a language "
            "model with its tokenizer, which llama.cpp runs; onnx, any Mamba student, which "
            "onnxruntime runs; or html, a classifier as a page that reads what is typed in a "
            "browser."
        ),
    ],
    ids_only: Annotated[
        bool,
        typer.Option(help="Leave the tokenizer out of a gguf: it takes and gives token ids."),
    ] = False,
) -> None:
    """Write a trained student as a file or folder that other programs run."""
    with reported():
        from teacher_cache.pipeline import commands

        quiet_libraries()
        commands.export(run, out, to=to, ids_only=ids_only)


@_command("push", USING)
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a trained student.")],
    repo: Annotated[str, typer.Argument(help="Repository of the hub, as in you/student.")],
    with_cache: Annotated[
        bool, typer.Option("--with-cache", help="Push the cache too, as the data set REPO-cache.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where the cache lies now. Default: as the run says.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repositories private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and stop.")
    ] = False,
) -> None:
    """Send a student and its card to the hub, its cache too if asked for."""
    with reported():
        from teacher_cache.pipeline import pushing
        from teacher_cache.pipeline.tables import uploads_table

        quiet_libraries()
        uploads = pushing.uploads_of(run, repo, with_cache=with_cache, cache=cache)
        console.print(uploads_table(uploads))
        if dry_run:
            console.print("nothing was sent: --dry-run", style="dim")
            return
        pushing.push(
            uploads,
            private=private,
            say=lambda text: console.print(text, style="green", soft_wrap=True),
        )


@_command("report", LOOKING)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, compared.")],
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html in the first run's folder.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where the runs' cache lies now. Default: as they say.")
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            help="Id of a sample whose attention maps are drawn, if the cache holds maps; may be "
            "given several times. Default: the first."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Compare by these figures, which `pipe evaluate --json` wrote. Default: the runs "
            "are evaluated on what they held out of their cache."
        ),
    ] = None,
) -> None:
    """Write runs' result, curves, disagreements, cost and cache as one HTML page."""
    with reported():
        from teacher_cache.pipeline import commands
        from teacher_cache.pipeline.report.report import REPORT_NAME, ReportOptions

        quiet_libraries()
        options = ReportOptions(runs=runs, cache=cache, samples=sample or (), evaluation=evaluation)
        commands.report(options, out or runs[0] / REPORT_NAME)


@_command("run", TRAINING)
def run(
    config: Annotated[
        str, typer.Option(help="YAML file, or the name of one of the package's: demo.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set one key, as in --set train_student.alpha=0.9."),
    ] = None,
) -> None:
    """Run a whole configuration: teacher, cache, students, evaluation; resumes where it stopped."""
    with reported():
        from teacher_cache.pipeline.commands import run_all

        quiet_libraries()
        run_all(config, settings or [], sections=SECTIONS, console=console)


if __name__ == "__main__":  # torchrun -m
    main()
