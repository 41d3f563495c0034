"""A student that starts where its teacher stands, as a user makes one, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import done, pipe, refused
from tests.teachers_to_copy import saved_teacher

pytestmark = pytest.mark.usefixtures("no_network")

PROSE = "Emma Woodhouse, handsome, clever, and rich.\n\nShe was the youngest of the two.\n\n"
SHORT = ("--batch-size", "2", "--max-steps", "4", "--checkpoint-steps", "2", "--log-steps", "1")


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    end: Any = gpt2_tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(gpt2_tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    saved_teacher(config, folder)
    gpt2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    (folder / "emma.txt").write_text(PROSE * 6)
    done(
        *("cache-teacher", "--task", "lm", "--data", folder / "emma.txt", "--teacher", teacher),
        *("--out", folder / "cache", "--txt-unit", "paragraph", "--max-length", "24"),
        *("--hidden", "all"),
    )
    return folder / "cache"


def trained(cache: Path, run: Path, *options: str | Path) -> list[dict[str, Any]]:
    """The lines of a student's log, in order."""
    done("train-student", "--cache", cache, "--out", run, "--init", "teacher", *SHORT, *options)
    return (read_run(run).result or {})["log"]


def test_all_behind_every_layer(cache: Path) -> None:
    manifest = read_manifest(cache)
    names = {one.name for one in manifest.schema}
    assert {"hidden_0", "hidden_1", "hidden_2"} <= names and "hidden_3" not in names
    assert manifest.settings["hidden"] == "0,1,2"


def test_a_student_of_kept_layers_begins_as_its_teacher(
    cache: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    log = trained(cache, run, "--layers", "attention:0-2", "--alpha", "1", "--temperature", "1")
    assert log[0]["kd"] < 1e-4  # what the codec rounds
    config = json.loads((run / "config.json").read_text())
    assert config["attn_layer_idx"] == [0, 1, 2] and config["d_model"] == 16
    settings = read_run(run).settings
    assert settings["init"] == "teacher" and settings["d_intermediate"] == 24
    student = AutoModelForCausalLM.from_pretrained(run)
    assert torch.isfinite(student(torch.arange(9)[None]).logits).all()


def test_layers_learn_alone_and_then_together(cache: Path, tmp_path: Path) -> None:
    staged = ("--transfer-schedule", "layerwise", "--hidden-weight", "1")
    log = trained(
        cache, tmp_path / "run", *staged, "--transfer-shares", "0,0.5", "--layers", "attention:1"
    )
    losses = [line for line in log if "layers" in line]
    assert len(losses) == 4 and losses[1]["layers"] < losses[0]["layers"]
    assert losses[0]["loss"] == pytest.approx(losses[0]["layers"], rel=1e-4)
    assert losses[3]["loss"] != pytest.approx(losses[3]["layers"], rel=1e-2)


def test_it_evaluates_predicts_and_goes_on(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--eval-fraction", "0.3")
    trained(cache, run, *more)
    again = pipe(
        "train-student", "--cache", cache, "--out", run, "--init", "teacher", *SHORT, *more
    )
    assert "student was trained before" in again.stdout
    done("evaluate", run, "--cache", cache)
    assert "Emma" in done("predict", run, "Emma")


def test_the_teacher_is_moved_or_changed(cache: Path, teacher: Path, tmp_path: Path) -> None:
    command = ("train-student", "--cache", cache, "--out", tmp_path / "run", "--init", "teacher")
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    done(*command, *SHORT, "--teacher-folder", moved)
    model = AutoModelForCausalLM.from_pretrained(moved)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(moved)
    refused(
        *command, "--seed", "1", "--teacher-folder", moved,
        saying="moved holds other weights than those that made .*: give the folder of that teacher",
    )  # fmt: skip
    refused(
        *command, "--teacher-folder", tmp_path / "none",
        saying="--init teacher needs the folder of the teacher, and .*none is none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "saying"),
    (
        (("--d-model", "32"), "--init teacher takes the teacher's sizes: leave --d-model out"),
        (("--arch", "mamba"), "makes a Mamba-2 of the teacher's layers, and --arch is mamba"),
        (("--layers", "attention:3"), "--layers names layer 3, and .* has 3, 0 to 2"),
        (("--layers", "attention:x"), "attention:x is no part of --layers: give mixers"),
        (("--layers", "mamba:0"), "--layers names mamba, and --arch is mamba2"),
        (("--layers", "attention:0-1,mamba2:1"), "mamba2:1 names a layer that another part"),
        (("--embeddings", "teacher"), "--init teacher brings the teacher's embeddings"),
        (
            ("--transfer-schedule", "layerwise"),
            "--transfer-schedule is an option of --hidden-weight",
        ),
    ),
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_what_does_not_fit_is_refused(
    options: tuple[str, ...], saying: str, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refused(
        *("train-student", "--cache", cache, "--out", run, "--init", "teacher", *options),
        saying=saying,
    )
    assert not run.exists()


def test_layers_of_a_fresh_student(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = ("--d-model", "16", "--num-layers", "2", "--expand", "2", "--head-dim", "8")
    done(
        *("train-student", "--cache", cache, "--out", run, *SHORT, *sizes),
        *("--layers", "attention:1", "--d-intermediate", "24"),
    )
    config = json.loads((run / "config.json").read_text())
    assert config["attn_cfg"]["num_heads"] == 1 and config["d_intermediate"] == 24
    refused(
        *("train-student", "--cache", cache, "--out", run, *sizes, "--layers", "attention:2"),
        saying="--layers names layer 2, and the student has 2, counted from 0",
    )
    refused(
        *("train-student", "--cache", cache, "--out", run, "--teacher-folder", tmp_path),
        saying="--teacher-folder is of --init teacher, which is not given",
    )
    refused(
        *("train-student", "--cache", cache, "--out", run, *sizes, "--hidden-weight", "1"),
        *("--transfer-schedule", "layerwise"),
        saying="the student's layers are not its teacher's: give --init teacher",
    )
