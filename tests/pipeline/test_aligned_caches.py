"""Qwen's 151,936 logits and a student of SmolLM2's 49,152 ids, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.packaged_tokenizers import smollm2_tokenizer_folder
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.options import CacheTeacherOptions
from teacher_cache.pipeline.presets import resolve_cache_teacher
from teacher_cache.pipeline.settings import read_config_file
from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.tiny_qwen import NUM_IDS, NUM_ROWS, write_tiny_qwen_moe

pytestmark = pytest.mark.usefixtures("no_network")

PROSE = ("Emma Woodhouse, handsome, clever, and rich.\n", "She was the youngest of the two.\n")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen_moe(tmp_path_factory.mktemp("tiny-moe"))


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prose") / "emma.txt"
    file.write_text("".join(PROSE))
    return file


def command(prose: Path, teacher: Path, cache: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return (
        "cache-teacher", "--task", "lm", "--data", prose, "--teacher", teacher, "--out", cache,
        "--student-tokenizer", smollm2_tokenizer_folder(), "--top-k", "8", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mapped_cache(tmp_path_factory: pytest.TempPathFactory, prose: Path, teacher: Path) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "mapped"
    done(*command(prose, teacher, cache, "--align", "map"))
    return cache


def rows(printed: str) -> dict[str, str]:
    """The lines of tables of two columns."""
    cells = [line.split("│")[1:3] for line in printed.splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in cells}


def test_the_teachers_ids_are_kept_and_the_cut_is_named(
    prose: Path, teacher: Path, tmp_path: Path
) -> None:
    outcome = pipe(*command(prose, teacher, tmp_path / "cache"))
    assert outcome.code == 0, outcome.stderr
    said = " ".join(outcome.stderr.split())
    assert "cut at 49,152, 99.97% of the ids would mean another string" in said
    manifest = read_manifest(tmp_path / "cache")
    assert manifest.settings["support"]["kind"] == "teacher"
    assert manifest.settings["support"]["size"] == NUM_IDS < NUM_ROWS
    assert manifest.about["vocabularies"]["num_differing_below_cut"] == 49_135
    # The join stops where the ids mean other strings.
    printed = refused(
        "check", "--cache", tmp_path / "cache", "--student-tokenizer", smollm2_tokenizer_folder(),
        code=1, saying="tokenization is not that of",
    )  # fmt: skip
    assert "id-to-string table" in printed


def test_a_cut_is_refused(prose: Path, teacher: Path, tmp_path: Path) -> None:
    refused(
        *command(prose, teacher, tmp_path / "cache", "--align", "truncate"),
        code=1,
        saying=r"--align truncate needs ids that mean the same .* 17 mean the same .* 39,237 "
        r"strings are shared .* 99\.97% .*: use --align map",
    )
    assert not (tmp_path / "cache").exists()


def test_a_mapped_cache_says_so(mapped_cache: Path, prose: Path) -> None:
    manifest = read_manifest(mapped_cache)
    support = manifest.settings["support"]
    assert (support["kind"], support["align"], support["size"]) == ("aligned", "map", 49_152)
    assert re.fullmatch(r"aligned:[0-9a-f]{64}", support["aligned"])
    assert manifest.settings["codec"]["support_size"] == 49_152
    assert manifest.about["vocabularies"]["num_mapped"] == 39_237
    sample = CacheReader(mapped_cache).sample(0)
    assert sample["topk_ids"].dtype == "uint16"  # no id needs more, unlike the teacher's
    found = rows(done("inspect", mapped_cache))
    coverage = manifest.about["probe"]["reconstruction"][0]["coverage"]
    assert found["coverage of the student's ids at temperature 1"] == f"{coverage:.4f}"
    assert 0.1 < coverage < 0.5  # a random teacher spreads over all ids: 39,237 of 151,665


def test_a_samples_tokens_are_named(mapped_cache: Path) -> None:
    sample_id = CacheReader(mapped_cache).sample(0)["sample_id"].tobytes().hex()
    printed = done("inspect", mapped_cache, "--sample", sample_id)
    lines = re.findall(r"at \d+, \S+: next is \S+ .*; T=1: (.*)", printed)
    assert lines and all("all others" in line for line in lines)
    assert "None" not in printed


def test_the_teacher_says_the_same_again(mapped_cache: Path) -> None:
    printed = done("verify", mapped_cache, "--deep", "1")
    found = re.search(r"distributions as cached: largest KL of a position (\S+) nats", printed)
    assert found and abs(float(found[1])) < 1e-4


def test_no_other_student_is_served(mapped_cache: Path, tmp_path: Path) -> None:
    refused(
        "train-student", "--cache", mapped_cache, "--out", tmp_path / "run", *TINY_STUDENT,
        code=1, saying="was mapped to the table .* and serves no other student",
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["topk", "sampled"])
def test_its_own_student_learns_from_it(
    prose: Path, teacher: Path, mapped_cache: Path, tmp_path: Path, codec: str
) -> None:
    cache, run = mapped_cache, tmp_path / "run"
    if codec == "sampled":
        cache = tmp_path / "sampled"
        asked = [one for one in command(prose, teacher, cache) if one not in ("--top-k", "8")]
        done(*asked, "--align", "map", "--codec", codec, "--num-draws", "9")
    student = ("--student-tokenizer", smollm2_tokenizer_folder())
    assert "positions" in done("check", "--cache", cache, *student)
    done("train-student", "--cache", cache, "--out", run, *student, *TINY_STUDENT)
    config = json.loads((run / "config.json").read_text())
    assert config["vocab_size"] == 49_152
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["align"], settings["alignment"]["kind"]) == ("auto", "map")


def test_a_dry_run_says_bytes_kl_and_coverage(
    prose: Path, teacher: Path, tmp_path: Path, mapped_cache: Path
) -> None:
    asked = command(prose, teacher, tmp_path / "none", "--align", "map", "--dry-run")
    found = rows(done(*asked))
    assert found["bytes a token"] == "57.0"  # 3 * 8 + 6 + 4 * 5, and 7 of the token itself
    assert "nats" in found["reconstruction KL at temperature 1"]
    inspected = rows(done("inspect", mapped_cache))
    name = "coverage of the student's ids at temperature 1"
    assert found[name] == inspected[name]
    assert not (tmp_path / "none").exists()


def test_the_preset_names_both_sides() -> None:
    config = resolve_cache_teacher(CacheTeacherOptions.of(data="moe-to-mamba"))
    assert config.task == "lm"
    assert config.labeled.source == "Salesforce/wikitext:wikitext-2-raw-v1"
    assert (config.labeled.split, config.labeled.text_column) == ("train", "text")
    assert config.forward.teacher == "huihui-ai/Huihui-MoE-1B-A0.6B"
    assert (config.aligned.student_tokenizer, config.aligned.align) == (
        "HuggingFaceTB/SmolLM-135M",
        None,
    )
    options = CacheTeacherOptions.of(data="moe-to-mamba", teacher="t", student_tokenizer="s")
    config = resolve_cache_teacher(options)
    assert (config.forward.teacher, config.aligned.student_tokenizer) == ("t", "s")


def test_the_configuration_maps_at_capture() -> None:
    content = read_config_file("moe-to-mamba")
    config = resolve_cache_teacher(CacheTeacherOptions.of(**content["cache_teacher"]))
    assert config.aligned.align == "map"
    assert config.aligned.student_tokenizer == content["train_student"]["student_tokenizer"]


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--data", "imdb", "--align", "map"), "--align is of language models"),
        (("--data", "imdb", "--student-tokenizer", "t"), "--student-tokenizer is of language"),
        (("--data", "austen", "--teacher", "t", "--align", "map"), "give --student-tokenizer"),
        (("--data", "moe-to-mamba", "--align", "map", "--codec", "hidden"), "whole distribution"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: tuple[str, ...], saying: str) -> None:
    refused("cache-teacher", *options, "--dry-run", saying=saying)
