"""From a teacher of one tokenizer to a student of another, through the command line alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerBase,
)

from benchmarks.tokenizers import folder_of
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.join.aligned_sample import SampleAligner
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.tokens.tokenizers import load_tokenizer, save_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import exact_map
from tests.command_line import done
from tests.tiny_models import write_tiny_language_model

CODE = [
    "def sign(x):\n    if x < 0:\n        return -1\n\n    return 1\n",
    "class A:\n\tdef f(self):\n\t\treturn  2\n\n\nA().f()\n",
]
NUM_COPIES = 4
# Enough to learn two files by heart; with its own text first, whatever a random teacher says.
STUDENT = (
    "--alpha", "0.05", "--temperature", "1", "--d-model", "32", "--num-layers", "1",
    "--expand", "2", "--d-state", "16", "--head-dim", "16", "--batch-size", "2", "--lr", "2e-2",
    "--max-steps", "100", "--checkpoint-steps", "100", "--eval-fraction", "0.1", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("code") / "code.jsonl"
    file.write_text("\n".join(json.dumps({"text": one}) for one in CODE * NUM_COPIES))
    return file


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny, random Gemma 3 with the real tokenizer."""
    folder = tmp_path_factory.mktemp("gemma")
    tokenizer = load_tokenizer(str(folder_of("gemma3")), option="--teacher")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        sliding_window=32, initializer_range=0.3,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def cache(code: Path, gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    done(
        "cache-teacher", "--task", "lm", "--data", code, "--teacher", gemma, "--max-length", "64",
        "--top-k", "16", "--device", "cpu", "--out", folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(folder, gpt2_tokenizer)
    return folder


@pytest.fixture(scope="module")
def run(cache: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done(
        "train-student", "--cache", cache, "--student-tokenizer", gpt2, "--align", "map", *STUDENT,
        "--out", folder,
    )  # fmt: skip
    return folder


def test_what_the_student_reads_is_the_code_and_gemmas_runs_have_its_ids(
    cache: Path, gpt2: Path
) -> None:
    teacher, student = (
        Reader.of(load_tokenizer(str(one), option="--teacher")) for one in (cache / "teacher", gpt2)
    )
    aligner = SampleAligner(teacher=teacher, student=student)
    reader = CacheReader(cache)
    read = ""
    for sample in map(reader.sample, range(len(reader))):
        aligned = aligner(sample)
        read += str(student.tokenizer.decode(aligned.input_ids))
        assert (aligned.num_unequal_chunks, aligned.num_unknown) == (0, 0)
    assert Counter(read.split("<|endoftext|>")) == dict.fromkeys(CODE, NUM_COPIES) | {"": 1}
    ends: Any = teacher.tokenizer.eos_token_id, student.tokenizer.eos_token_id
    to_student = exact_map(teacher.table, student.table, ends=ends).student_ids
    to_teacher = exact_map(student.table, teacher.table, ends=ends[::-1]).student_ids
    gemmas, gpt2s = (one.tokenizer.get_vocab() for one in (teacher, student))
    assert to_student[gemmas["\n"]] == gpt2s["Ċ"] and to_student[gemmas["\n\n"]] == gpt2s["ĊĊ"]
    # And back: the token that Gemma's tokenizer writes, not the single byte.
    assert to_teacher[gpt2s["Ċ"]] == gemmas["\n"] and to_teacher[gpt2s["ĉ"]] == gemmas["\t"]


def test_it_writes_real_indentation(run: Path) -> None:
    written = done("predict", run, "def sign(x):\n    if x", "--max-new-tokens", "20")
    assert written.startswith("def sign(x):\n    if x < 0:\n        return -1\n\n    return 1\n")
    written = done("predict", run, "class A:\n\tdef f", "--max-new-tokens", "20")
    assert written.startswith("class A:\n\tdef f(self):\n\t\treturn  2\n\n\nA()")


def test_bits_a_byte_are_of_the_bytes_of_the_file(
    run: Path, code: Path, gemma: Path, gpt2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    done("evaluate", run, "--data", code, "--teacher", gemma, "--json", figures, "--device", "cpu")
    teacher, student = json.loads(figures.read_text())["rows"]
    # Gemma's begin predicts all of a file, and GPT-2's first token is predicted by nothing.
    firsts = [str(gpt2_tokenizer.decode(gpt2_tokenizer(one)["input_ids"][:1])) for one in CODE]
    of_file = NUM_COPIES * sum(len(one.encode()) for one in CODE)
    assert_counted(teacher, of_file)
    assert_counted(student, of_file - NUM_COPIES * sum(len(one.encode()) for one in firsts))


def assert_counted(row: dict[str, Any], num_bytes: int) -> None:
    bits = row["nll"] * row["num_positions"] / math.log(2)
    assert np.isclose(row["bits_per_byte"], bits / num_bytes, rtol=1e-6)


TALK = ["the film is good.", "the film is bad, and long."]


@pytest.fixture(scope="module")
def wordpiece_run(
    tmp_path_factory: pytest.TempPathFactory, bert_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A student of a tiny causal model that reads `[CLS] text [SEP]`, as BERT does."""
    folder = tmp_path_factory.mktemp("wordpiece")
    write_tiny_language_model(folder / "teacher", bert_tokenizer)
    (folder / "talk.txt").write_text("\n".join(TALK * 8))
    done(
        "cache-teacher", "--task", "lm", "--data", folder / "talk.txt", "--teacher",
        folder / "teacher", "--max-length", "32", "--top-k", "4", "--device", "cpu",
        "--out", folder / "cache",
    )  # fmt: skip
    done("train-student", "--cache", folder / "cache", *STUDENT, "--out", folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("the film is good", TALK[0]), ("the film is bad", TALK[1]), ("The film is bad,", TALK[1])],
)
def test_a_wordpiece_model_goes_on_with_a_text_and_ends_with_it(
    wordpiece_run: Path, prompt: str, text: str
) -> None:
    """The `[SEP]` behind a prompt is not of it, and the one that is written is the end."""
    written = done("predict", wordpiece_run, prompt, "--max-new-tokens", "40")
    assert written == prompt + text[len(prompt) :] + "\n"
