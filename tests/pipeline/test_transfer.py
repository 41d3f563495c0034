"""Transfer as a user drives it: both stages on the command line, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import TINY_STUDENT, done, pipe, refused
from tests.tiny_models import write_tiny_language_model


@pytest.fixture(scope="module")
def gpt2_cache(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, acl_imdb: Path) -> Path:
    """The pooled rows of a causal teacher, whose student appends a token to pool at."""
    out = tmp_path_factory.mktemp("caches") / "gpt2"
    done(
        *("cache-teacher", "--data", acl_imdb, "--teacher", tiny_gpt2, "--out", out),
        *("--max-samples", "40", "--unlabeled", "none", "--max-length", "24"),
        *("--label-names", "neg,pos", "--attention", "cls", "--attention-layers", "1"),
    )
    return out


def trained(cache: Path, run: Path, *options: str, saying: str) -> dict[str, Any]:
    """Train a tiny student, which layers were matched being said; the first line of its log."""
    outcome = pipe(
        *("train-student", "--cache", cache, "--out", run, "--log-steps", "1"),
        *TINY_STUDENT,
        *options,
    )
    assert outcome.code == 0 and saying in " ".join(outcome.stderr.split())
    return next(one for one in (read_run(run).result or {})["log"] if "loss" in one)


def test_pooled_rows_of_a_causal_teacher(gpt2_cache: Path, tmp_path: Path) -> None:
    saying = "attention maps matched, student's layer to teacher's: 0:1"
    line = trained(gpt2_cache, tmp_path / "run", "--attention-weight", "0.5", saying=saying)
    assert line["attention"] > 0 and "hidden" not in line
    student = json.loads((tmp_path / "run" / "config.json").read_text())
    assert student["position_map"]["mode"] == "append"
    settings = read_run(tmp_path / "run").settings
    assert settings["attention_weight"] == 0.5 and settings["attention_loss"] == "kl"


def test_a_cache_without_hidden_states_is_refused(gpt2_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(
        *("train-student", "--cache", gpt2_cache, "--out", run, "--hidden-weight", "1"),
        saying="--hidden-weight 1 needs hidden states of .*`pipe cache-teacher --hidden`",
    )
    assert not run.exists()


def test_a_cache_without_maps_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(
        *("train-student", "--cache", tiny_cache, "--out", run, "--attention-weight", "0.5"),
        saying="--attention-weight 0.5 needs .* maps, .*`pipe cache-teacher --attention mean`",
    )
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--attention-weight", "1", "--pooling", "mean"), "a student of --pooling mean pools at"),
        (("--attention-weight", "1", "--attention-layer-map", "0:0"), "layer 0 of the teacher"),
        (("--attention-loss", "cosine"), "--attention-loss is an option of --attention-weight"),
        (("--attention-weight", "1", "--arch", "hf:x"), "only a Mamba student takes"),
        (
            (
                *("--attention-weight", "1", "--transfer-schedule", "staged"),
                *("--early-stopping", "2"),
            ),
            "--early-stopping waits for a better accuracy",
        ),
        (("--attention-weight", "1", "--attention-channels", "4"), "is of --arch mamba"),
        (
            (
                *("--attention-weight", "1", "--arch", "mamba", "--attention-channels", "33"),
                *("--d-model", "16", "--expand", "2"),
            ),
            r"--attention-channels 33 of a Mamba-1 that has 32 .*: give at most as many",
        ),
        (("--attention-weight", "1", "--attention-layer-map", ""), "expected pairs of layers"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    options: tuple[str, ...], words: str, gpt2_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refused("train-student", "--cache", gpt2_cache, "--out", run, *options, saying=words)
    assert not run.exists()


@pytest.fixture(scope="module")
def packed_cache(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Maps and states of a causal language model over packed lines."""
    folder = tmp_path_factory.mktemp("lm")
    teacher = write_tiny_language_model(folder / "teacher", gpt2_tokenizer)
    words = [
        "the",
        "film",
        "was",
        "long",
        "and",
        "slow",
        "but",
        "we",
        "liked",
        "it",
        "all",
        "the",
        "same",
    ]
    lines = [" ".join(words[i % 7 : 5 + i % 9]) for i in range(60)]
    (folder / "lines.txt").write_text("\n".join(line or "so" for line in lines))
    done(
        *("cache-teacher", "--task", "lm", "--data", folder / "lines.txt", "--teacher", teacher),
        *("--max-length", "16", "--top-k", "4", "--out", folder / "cache"),
        *("--attention", "mean", "--attention-layers", "all", "--hidden", "0,1"),
    )
    return folder / "cache"


@pytest.mark.parametrize("arch", [("mamba2", "--head-dim", "8"), ("mamba",)])
def test_a_language_model_on_packed_text(
    packed_cache: Path, tmp_path: Path, arch: tuple[str, ...]
) -> None:
    done(
        *("train-student", "--cache", packed_cache, "--out", tmp_path / "run", "--arch", *arch),
        *("--d-model", "16", "--num-layers", "2", "--expand", "2", "--d-state", "4"),
        *("--batch-size", "4", "--max-steps", "6", "--log-steps", "1", "--lr", "0.02"),
        *("--attention-weight", "1", "--hidden-weight", "0.5"),
        *("--transfer-schedule", "staged", "--transfer-shares", "0.34,0.34"),
    )
    log = [one for one in (read_run(tmp_path / "run").result or {})["log"] if "loss" in one]
    assert len(log) == 6 and all(line["attention"] > 0 and line["hidden"] > 0 for line in log)
    trained = [line["attention"] for line in log[:2]] + [line["hidden"] / 2 for line in log[2:4]]
    assert [line["loss"] for line in log[:4]] == pytest.approx(trained, rel=1e-3)
