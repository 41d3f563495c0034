"""`--arch hf:DIR` on a language model's cache: from transformers' weights to such a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.stages import train_student
from teacher_cache.stages.training.config import ArchitectureConfig, TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import done, refused
from tests.stages.test_train_language_model import TEXTS, DiesAt, Interruption
from tests.tiny_language_models import MAX_LENGTH, tiny_teacher, write_cache
from tests.tiny_models import tiny_language_model
from tests.tiny_runs import result_files, result_log

pytestmark = pytest.mark.usefixtures("tokenizers_read_once")

QUICK: dict[str, Any] = {
    "device": "cpu", "batch_size": 2, "gradient_accumulation": 2, "max_steps": 6,
    "checkpoint_steps": 2, "log_steps": 1, "eval_fraction": 0.4, "lr": 2e-3, "conf_power": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(gpt2_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Of few ids, so that a run takes no time."""
    assert isinstance(gpt2_tokenizer, PreTrainedTokenizerFast)
    return gpt2_tokenizer.train_new_from_iterator(TEXTS, 300)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "lm"
    num_ids = len(tokenizer)
    codec = TopKCodec(support_size=num_ids, top_k=4)
    return write_cache(folder, codec, tokenizer, TEXTS, tiny_teacher(num_ids))


def gpt2_config(num_ids: int, **changes: Any) -> GPT2Config:
    """With dropout, as GPT-2 has it."""
    shape: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32} | changes
    return GPT2Config(vocab_size=num_ids, **shape)


def llama_config(num_ids: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=num_ids, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip


def write(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    tiny_language_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def start(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    make = gpt2_config if request.param == "gpt2" else llama_config
    folder = tmp_path_factory.mktemp("start") / request.param
    return write(folder, make(len(tokenizer)), tokenizer)


def config(cache: Path, start: Path, out: Path, **changes: Any) -> TrainStudentConfig:
    return TrainStudentConfig.of(cache=cache, out=out, arch=f"hf:{start}", **(QUICK | changes))


@pytest.fixture(scope="module")
def run(cache: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_student.run(config(cache, start, tmp_path_factory.mktemp("runs") / "student")).run


def test_comes_closer_to_the_teacher(run: Path, start: Path) -> None:
    evaluations = [line for line in result_log(run) if "eval_kl" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert evaluations[-1]["eval_kl"] < evaluations[0]["eval_kl"]
    record = read_run(run)
    assert record.settings["task"] == "lm" and record.settings["arch"] == "hf"
    assert record.about["start"] == f"hf:{start}" and record.about["packs"]
    assert len(record.settings["start"]["weights_sha256"]) == 64
    assert not set(ArchitectureConfig.model_fields) - {"arch"} & record.settings.keys()
    assert str(start) not in json.dumps(record.settings)


def test_the_folder_is_transformers_own(run: Path, start: Path) -> None:
    before, after = (load_file(one / "model.safetensors") for one in (start, run))
    assert before.keys() == after.keys()
    assert all(one.dtype == torch.float32 for one in after.values())
    assert not any(torch.equal(before[name], after[name]) for name in before if "wte" in name)
    model: Any = AutoModelForCausalLM.from_pretrained(run)
    assert [type(model).__name__] == json.loads((start / "config.json").read_text())[
        "architectures"
    ]
    found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert found.shape == (1, 6)


def test_goes_on_bit_for_bit_after_a_kill(
    run: Path, cache: Path, start: Path, tmp_path: Path
) -> None:
    """Dropout included, and a tied head's weight in the checkpoint once."""
    killed = config(cache, start, tmp_path / "student")
    for step in (3, 5):
        with pytest.raises(Interruption):
            train_student.run(killed, DiesAt(step))
    (weights,) = (tmp_path / "student").glob("checkpoints/checkpoint-4/*.safetensors")
    assert ("student.lm_head.weight" in load_file(weights)) == ("llama" in start.name)
    assert result_files(train_student.run(killed).run) == result_files(run)


def test_other_weights_are_another_run(
    run: Path, cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = write(tmp_path / "other", gpt2_config(len(tokenizer), n_embd=4), tokenizer)
    with pytest.raises(UserError, match=r"start\.\w+ is '.*' there and '.*' in this"):
        train_student.run(config(cache, other, run))


def test_a_configuration_alone_starts_from_the_seed(
    cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    gpt2_config(len(tokenizer)).save_pretrained(tmp_path / "start")
    once = {"max_steps": 1, "seed": 3, "dtype": "float32"}
    runs = [
        train_student.run(config(cache, tmp_path / "start", tmp_path / name, **once)).run
        for name in ("one", "two")
    ]
    assert result_files(runs[0]) == result_files(runs[1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n: gpt2_config(n, n_positions=MAX_LENGTH - 8), r"reads 16 tokens, and "),
        (lambda n: gpt2_config(n - 1), "has embeddings for [0-9]+ tokens, and"),
        (
            lambda n: BertConfig(
                vocab_size=n, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=8, is_decoder=False, initializer_range=0.5,
            ),
            "looks at later tokens",
        ),
        (lambda n: ViTConfig(), "of which transformers has no causal language model"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be_such_a_student(
    cache: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    make: Any,
    words: str,
) -> None:
    made = make(len(tokenizer))
    made.save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match=words):
        train_student.run(config(cache, tmp_path / "start", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_refuses_weights_that_are_not_there(
    cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    start = write(tmp_path / "start", llama_config(len(tokenizer)), tokenizer)
    weights = load_file(start / "model.safetensors")
    del weights["model.norm.weight"]
    from safetensors.torch import save_file

    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for model\.norm\.weight of a LlamaFor"):
        train_student.run(config(cache, start, tmp_path / "run"))


def test_the_command_line(cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    start = write(tmp_path / "start", gpt2_config(len(tokenizer)), tokenizer)
    command = (
        "train-student", "--cache", cache, "--arch", f"hf:{start}", "--device", "cpu",
        "--batch-size", "2", "--max-steps", "2", "--eval-fraction", "0.4",
    )  # fmt: skip
    printed = done(*command, "--out", tmp_path / "run")
    assert "trained: " in printed
    refused(*command, "--out", tmp_path / "no", "--d-model", "8", saying="only a Mamba student")
    refused(*command, "--out", tmp_path / "no", "--lm-weight", "1", saying="--lm-weight")
