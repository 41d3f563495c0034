"""What a user gets wrong, and what the machine refuses: each an exit code and one sentence."""

from __future__ import annotations

import filecmp
import json
import re
from pathlib import Path

import pytest
import torch

from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.integration.conftest import Copy, cache_command, contents
from tests.small_caches import read_unchecked

Args = tuple[str | Path, ...]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def wrote(name: str, content: str) -> str:
    Path(name).write_text(content)
    return name


# Options, presets, configuration.


@pytest.mark.parametrize(
    ("args", "suggested"),
    [
        (("train-student", "--alpah", "0.5"), "--alpha"),
        (("cache-teacher", "--data", "imdb", "--max-sample", "5"), "--max-samples"),
        (("train-studnet",), "train-student"),
    ],
)
def test_an_unknown_option_or_command_suggests_the_nearest(args: Args, suggested: str) -> None:
    outcome = pipe(*args)
    assert outcome.code == 2
    assert suggested in outcome.stderr and "No such" in outcome.stderr
    assert outcome.stdout == ""


def test_an_unknown_preset_suggests_the_nearest() -> None:
    refused("cache-teacher", "--data", "imbd", saying="no preset, .*'imbd': did you mean 'imdb'")
    refused("run", "--config", "imbd", saying="did you mean 'imdb'")


@pytest.mark.parametrize(
    ("command", "content", "saying"),
    [
        ("train-student", "train_student: {alpah: 1}", "no setting 'alpah': did you mean 'alpha'"),
        ("train-student", "trian_student: {}", "no section 'trian_student': did you mean 'train_"),
        ("train-student", "train_student: {alpha: 2}", "--alpha is 2; input should be less than"),
        (
            "train-student",
            "train_student: {arch: rnn}",
            "--arch is 'rnn'; choose from hf:ID, mamba, m",
        ),
        ("train-student", "train_student: {arch: mambo}", "'mambo'; did you mean 'mamba'"),
        ("train-student", "train_student: {arch: 'hf:'}", "--arch is 'hf:'; expected a hub id or"),
        (
            "run",
            "{cache_teacher: {data: imdb, teacher: x}, train_student: {arch: hf:a/b, head: mlp}}",
            "students.student: only a Mamba student takes --head, and --arch hf:a/b brings its",
        ),
        ("check", "train_student: {alpah: 1}", "no setting 'alpah': did you mean 'alpha'"),
        ("run", "cache_teacher: {data: imdb, techer: x}", "no setting 'techer': did you mean 'tea"),
        ("run", "{cache_teacher: {data: imdb}, students: {a: {alpah: 1}}}", "students.a has no "),
        ("run", "{cache_teacher: {data: imdb}, students: {a: 1}}", "the student 'a' holds 1"),
        ("run", "train_student: {}", "has no section cache_teacher"),
        ("run", "{cache_teacher: {data: imdb}, convert: {}}", "has a section convert, which"),
    ],
)
def test_a_wrong_configuration(command: str, content: str, saying: str) -> None:
    refused(command, "--config", wrote("run.yaml", content), saying=saying)


def test_other_sections_of_a_shared_file_do_not_disturb(bert_cache: Path) -> None:
    # check reads train_student's section, which has more in it than a join needs.
    file = wrote("run.yaml", f"train_student: {{alpha: 0.9, cache: {bert_cache}}}\nevaluate: {{}}")
    assert "✓ tokenization verified" in done("check", "--config", file)


# What is not there.


@pytest.mark.parametrize(
    ("args", "saying"),
    [
        (("cache-teacher", "--data", "no.csv", "--teacher", "TEACHER"), "no file .*'no.csv'"),
        (("cache-teacher", "--data", "/no/where", "--teacher", "TEACHER"), "no .*'/no/where'"),
        (("cache-teacher", "--data", "DATA", "--teacher", "/no/t"), "--teacher /no/t is no folder"),
        (("cache-teacher", "--data", "DATA"), "names no teacher: give --teacher"),
        (("cache-teacher",), "needs --data"),
        (("finetune-teacher", "--data", "DATA", "--model", "/no/m"), "--model /no/m is no folder"),
        (("train-student",), "no complete cache in .*caches: run `pipe cache-teacher"),
        (("train-student", "--cache", "/no/cache"), "/no/cache is no cache"),
        (("train-student", "--cache", "RUN"), "is no cache"),
        (("check", "--cache", "CACHE", "--student-tokenizer", "/no/t"), "/no/t is no folder"),
        (("inspect", "/no/cache"), "/no/cache is no cache"),
        (("inspect", "CACHE", "--sample", "xyz"), "0 samples .* starts with 'xyz'"),
        (("inspect", "CACHE", "--sample", ""), "180 samples .* starts with ''"),
        (("verify", "/no/cache"), "/no/cache is no cache"),
        (("evaluate", "/no/run", "--data", "DATA"), "/no/run is no run"),
        (("evaluate", "RUN"), "evaluate needs --data"),
        (("evaluate", "RUN", "--data", "DATA", "--split", "tset"), "did you mean 'test'"),
        (("predict", "/no/run", "text"), "/no/run is no run"),
        (("predict", "CACHE", "text"), "is no run"),
        (("run", "--config", "/no/run.yaml"), "/no/run.yaml is no file"),
    ],
)
def test_what_is_missing_is_named(
    args: Args, saying: str, bert_cache: Path, bert_run: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    known = {"CACHE": bert_cache, "RUN": bert_run, "DATA": acl_imdb, "TEACHER": tiny_bert}
    refused(*(known.get(str(one), one) for one in args), saying=saying)


def test_without_a_hub_the_local_alternative_is_named() -> None:
    # As everywhere in the tests, HF_HUB_OFFLINE stands for a machine without a network.
    refused(
        "cache-teacher", "--data", "imdb",
        saying="hub could not be reached .*: give a local folder .* --data /path/to/aclImdb",
    )  # fmt: skip


def test_without_a_hub_a_teachers_folder_is_asked_for(acl_imdb: Path) -> None:
    saying = "'some/teacher' could not be loaded .*: give a folder that holds it with --teacher DIR"
    refused("cache-teacher", "--data", acl_imdb, "--teacher", "some/teacher", saying=saying)


# Data and teacher that do not fit.


@pytest.mark.parametrize(
    ("content", "options", "saying"),
    [
        ("", (), "data.csv is empty"),
        ("text,label\n", (), "data.csv holds no documents"),
        ('text,label\n" ",0\n" ",1\n', (), "first 2 documents of data.csv are all empty"),
        ("text,label\na,1\nb,1\n", (), "all 2 documents have the label '1'"),
        ("text,label\na,0\nb,1\nc,5\n", (), r"label 5, and the teacher has 2 classes \(0 neg, 1 p"),
        ("text,label\na,bad\nb,good\n", (), r"bad, good .* none of the teacher's classes \(0 neg"),
        ("text,label\na,0\nb,\n", (), "1 of 2 documents have no label in column 'label'"),
        ("body_text,label\na,0\nb,1\n", (), r"--text-column \(the columns are body_text, label\)"),
        ("text,mood\na,0\nb,1\n", (), r"--label-column \(the columns are text, mood\)"),
        (
            "text,label\na,0\nb,1\n",
            ("--text-column", "txet"),
            r"no column 'txet' \(the columns are text, label\): did you mean 'text'",
        ),
        ("text,label\na,0\nb,1\n", ("--split", "tset"), "no split 'tset'"),
        ("text,label\na,0\nb,1\n", ("--max-length", "513"), "513 is more than .*512 tokens"),
        ("text,label\na,0\nb,1\n", ("--max-length", "2"), "--max-length 2 leaves no room for text"),
        ("text,label\na,0\nb,1\n", ("--dtype", "float16"), "float16 was asked for on a CPU"),
    ],
)
def test_data_that_cannot_be_cached(
    content: str, options: Args, saying: str, tiny_bert: Path
) -> None:
    data = wrote("data.csv", content)
    refused("cache-teacher", "--data", data, "--teacher", tiny_bert, *options, saying=saying)
    assert not Path("caches").exists()


def test_names_without_an_order_need_one(acl_imdb: Path, tiny_gpt2: Path) -> None:
    saying = "teacher's classes have no names .* for example --label-names neg,pos"
    refused("cache-teacher", "--data", acl_imdb, "--teacher", tiny_gpt2, saying=saying)


def test_a_base_model_is_no_teacher(acl_imdb: Path, minilm_dir: Path) -> None:
    saying = "no trained weights for classifier.bias, .* `pipe finetune-teacher`"
    refused("cache-teacher", "--data", acl_imdb, "--teacher", minilm_dir, saying=saying)


def test_a_limit_that_leaves_one_class(acl_imdb: Path, tiny_bert: Path) -> None:
    command = cache_command(acl_imdb, tiny_bert, Path("cache"))
    refused(*command, "--max-samples", "1", saying="1 labelled .* of the class .*--max-samples")
    assert not Path("cache").exists()


# Settings of what exists already.


def test_changed_settings_on_a_cache_name_the_field_both_values_and_the_remedy(
    bert_cache: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    before = read_manifest(bert_cache)
    refused(
        *cache_command(acl_imdb, tiny_bert, bert_cache), "--max-length", "64",
        saying="settings.max_length is 512 there and 64 in this command. .*--overwrite",
    )  # fmt: skip
    assert read_manifest(bert_cache) == before


def test_another_teacher_on_a_cache(bert_cache: Path, acl_imdb: Path, tiny_gpt2: Path) -> None:
    command = cache_command(acl_imdb, tiny_gpt2, bert_cache)
    saying = "architecture is 'Bert.*' there and 'GPT2.*' in this.*weights_sha256"
    refused(*command, "--label-names", "neg,pos", saying=saying)


def test_fewer_documents_on_a_cache(bert_cache: Path, acl_imdb: Path, tiny_bert: Path) -> None:
    command = cache_command(acl_imdb, tiny_bert, bert_cache)
    refused(*command, "--max-samples", "10", saying="120 labeled documents, this run asks for 10")


def test_a_folder_of_something_else_is_left_alone(acl_imdb: Path, tiny_bert: Path) -> None:
    Path("thesis").mkdir()
    wrote("thesis/chapter.tex", "precious")
    command = cache_command(acl_imdb, tiny_bert, Path("thesis"))
    for options in ((), ("--overwrite",)):
        refused(*command, *options, saying="holds 'chapter.tex' and no manifest.json")
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.tex"]


def test_a_newer_format_is_refused_by_every_reader(
    own: Copy, bert_cache: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    cache = own(bert_cache)
    value = read_unchecked(cache)
    value["format_version"] = 99
    (cache / MANIFEST_NAME).write_text(json.dumps(value))
    for command in (
        ("inspect", cache),
        ("verify", cache),
        ("check", "--cache", cache),
        ("train-student", "--cache", cache),
        cache_command(acl_imdb, tiny_bert, cache),
    ):
        refused(*command, saying="version 99, this release reads .* up to version 3: upgrade")


def test_another_run_in_the_same_folder(bert_cache: Path, bert_run: Path) -> None:
    command = ("train-student", "--cache", bert_cache, "--out", bert_run, *TINY_STUDENT)
    refused(
        *command, "--alpha", "0.9",
        saying="alpha is 0.5 there and 0.9 in this command. .*another --out, or --resume never",
    )  # fmt: skip


def test_a_finished_run_is_not_run_again(bert_cache: Path, bert_run: Path) -> None:
    before = contents(bert_run)
    printed = done("train-student", "--cache", bert_cache, "--out", bert_run, *TINY_STUDENT)
    assert "✓ student was trained before" in printed
    assert contents(bert_run) == before


# The join.


def test_another_tokenizer_is_refused_with_a_table_and_the_ways_out(
    bert_cache: Path, tiny_gpt2: Path
) -> None:
    for command in (("check",), ("train-student", "--on-mismatch", "warn")):
        printed = refused(
            *command, "--cache", bert_cache, "--student-tokenizer", tiny_gpt2,
            code=1,
            saying="id-to-string table.* use the cache's own tokenizer.*; or run cache-teacher",
        )  # fmt: skip
        assert "tokenization differs" in printed
        (row,) = [line for line in printed.splitlines() if "id-to-string table" in line]
        assert "30,522 ids; id 0 is '[PAD]'" in row and "id 0 is '!'" in row
        assert row.rstrip("│ ").endswith("no")
    assert not Path("runs").exists()


def test_a_waivable_difference_stops_unless_it_is_let_pass_and_then_marks_the_run(
    bert_cache: Path, acl_imdb: Path
) -> None:
    command = ("--cache", bert_cache, "--max-length", "8")
    printed = refused("check", *command, code=1, saying=r"\(max length, .*--on-mismatch warn")
    assert "max length" in printed and "yes" in printed
    refused("train-student", *command, code=1, saying="--on-mismatch warn")
    assert not Path("runs").exists()

    waived = (*command, "--on-mismatch", "warn")
    assert "tokenization differs" in done("check", *waived)
    printed = done("train-student", *waived, "--out", "run", *TINY_STUDENT)
    assert "! tokenization differs (max length, documents re-tokenised)" in printed
    about = json.loads(Path("run/run.json").read_text())["about"]
    assert about["tokenization"] == ["max length", "documents re-tokenised"]
    printed = done("evaluate", "run", "--data", acl_imdb, "--latency-lengths", "8")
    assert "! run: trained although max length, documents re-tokenised differed" in printed


# Training.


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--head-dim", "7"), "head_dim 7 does not divide"),
        (("--early-stopping", "2", "--eval-fraction", "0"), "--early-stopping needs an evaluation"),
        (("--report-to", "wandb"), "--report-to wandb needs the package wandb"),
        (("--resume", "nowhere"), "nowhere is no complete checkpoint .*--resume auto"),
        (("--dtype", "float16"), "float16 was asked for on a CPU"),
    ],
)
def test_training_that_cannot_start(options: Args, saying: str, bert_cache: Path) -> None:
    refused("train-student", "--cache", bert_cache, *TINY_STUDENT, *options, saying=saying)


def test_a_refusal_leaves_no_run_behind(bert_cache: Path) -> None:
    # The mended command must not meet the settings of the one that was refused.
    command = ("train-student", "--cache", bert_cache, "--out", "run", *TINY_STUDENT)
    refused(*command, "--head-dim", "7", saying="head_dim 7")
    refused(*command, "--early-stopping", "2", "--eval-fraction", "0", saying="needs an evaluation")
    assert not Path("run").exists()


def test_a_changed_checkpoint_is_refused_by_name_and_skipped_otherwise(
    bert_cache: Path, own: Copy, bert_run: Path
) -> None:
    run = own(bert_run)
    newest = run / "checkpoints" / "checkpoint-6"
    with open(newest / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    (run / "run.json").write_text(
        json.dumps(json.loads((run / "run.json").read_text()) | {"complete": False, "result": None})
    )
    command = ("train-student", "--cache", bert_cache, "--out", run, *TINY_STUDENT)
    refused(*command, "--resume", newest, saying=f"{newest} is no complete checkpoint")
    outcome = pipe(*command)
    assert outcome.code == 0
    assert re.search(r"skipped \S*checkpoint-6", " ".join(outcome.stderr.split()))
    assert "going on from checkpoint-3" in outcome.stdout
    assert filecmp.cmp(run / "model.safetensors", bert_run / "model.safetensors", shallow=False)


def test_unlabeled_text_that_the_cache_does_not_hold(acl_imdb: Path, tiny_bert: Path) -> None:
    command = cache_command(acl_imdb, tiny_bert, Path("cache"))
    done(*command, "--unlabeled", "none", "--max-samples", "40")
    refused(
        "train-student", "--cache", "cache", "--unlabeled-alpha", "0.3", *TINY_STUDENT,
        saying="--unlabeled-alpha 0.3 needs unlabelled text, and cache holds none: .*--unlabeled",
    )  # fmt: skip


def test_unlabeled_text_that_is_all_empty(acl_imdb: Path, tiny_bert: Path) -> None:
    command = cache_command(acl_imdb, tiny_bert, Path("cache"))
    done(*command, "--unlabeled", wrote("blank.txt", " \n \n"), "--max-samples", "40")
    refused(
        "train-student", "--cache", "cache", "--unlabeled-alpha", "0.3", *TINY_STUDENT,
        saying="unlabeled split of cache holds no samples",
    )  # fmt: skip
    done("verify", "cache")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "args",
    [
        ("cache-teacher", "--data", "DATA", "--teacher", "TEACHER"),
        ("train-student", "--cache", "CACHE"),
        ("finetune-teacher", "--data", "DATA", "--model", "TEACHER"),
        ("evaluate", "RUN", "--data", "DATA"),
        ("predict", "RUN", "text"),
    ],
)
def test_cuda_where_there_is_none(
    args: Args, bert_cache: Path, bert_run: Path, acl_imdb: Path, tiny_bert: Path
) -> None:
    known = {"CACHE": bert_cache, "RUN": bert_run, "DATA": acl_imdb, "TEACHER": tiny_bert}
    command = [known.get(str(one), one) for one in args]
    refused(*command, "--device", "cuda", saying="--device cuda was demanded, .*give --device auto")


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--latency-lengths", "0"), "--latency-lengths is '0'; input should be greater than or"),
        (("--latency-lengths", "8,x"), "--latency-lengths is 'x'; input should be a valid integer"),
        (("--teacher", "/no/t"), "--teacher /no/t is no folder"),
    ],
)
def test_wrong_evaluations(options: Args, saying: str, bert_run: Path, acl_imdb: Path) -> None:
    refused("evaluate", bert_run, "--data", acl_imdb, *options, saying=saying)


def test_verify_deep_with_another_teacher(bert_cache: Path, tiny_gpt2: Path) -> None:
    refused(
        "verify", bert_cache, "--deep", "2", "--teacher", tiny_gpt2,
        code=1, saying="has other weights .*the one that made .*--teacher",
    )  # fmt: skip
