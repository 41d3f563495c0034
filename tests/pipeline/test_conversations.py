"""Conversations as a user caches them, learns from them, and talks with the student."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from teacher_cache.cache.reader import CacheReader
from tests.chat_templates import MARKED, SPECIAL, TRIMS
from tests.command_line import TINY_STUDENT, done, refused
from tests.tiny_models import write_tiny_language_model
from tests.tiny_tokenizers import tiny_byte_level

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_byte_level(SPECIAL)
    tokenizer.chat_template = MARKED
    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), tokenizer)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"what is behind the number {number}", "completion": f"it is {number + 1}"}
        for number in range(40)
    ]
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, chats: Path) -> Path:
    out = tmp_path_factory.mktemp("caches") / "chats"
    done(
        "cache-teacher", "--task", "lm", "--data", chats, "--teacher", teacher, "--out", out,
        "--loss-on", "assistant", "--end-of-turn", "<|done|>", "--max-length", "128", "--top-k",
        "20",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    done("train-student", "--cache", cache, "--out", out, "--eval-fraction", "0.3", *TINY_STUDENT)
    return out


def test_a_student_keeps_the_template_and_answers_with_it(run: Path, teacher: Path) -> None:
    assert AutoTokenizer.from_pretrained(run).chat_template == MARKED
    record = json.loads((run / "chat.json").read_text())
    assert record["loss_on"] == "assistant" and "<|done|>" in record["ends"]
    answer = done("predict", run, "--chat", "what is it", "--max-new-tokens", "8")
    assert "what is it" not in answer and "<|turn|>" not in answer
    whole = done("predict", run, "what is it", "--max-new-tokens", "8")
    assert whole.startswith("what is it")


def test_it_is_evaluated_on_what_counts(run: Path, cache: Path, chats: Path, teacher: Path) -> None:
    """From the cache, and on the same kind of data beside the teacher."""
    num_held_out = json.loads((run / "run.json").read_text())["settings"]["eval_fraction"]
    assert num_held_out == 0.3
    printed = done("evaluate", run, "--cache", cache, "--latency-lengths", "8")
    assert "perplexity" in printed
    printed = done(
        "evaluate", run, "--data", chats, "--max-samples", "12", "--latency-lengths", "8"
    )
    (counted,) = re.findall(r"reading (\d+) positions with teacher, student", printed)
    lines = [json.loads(one)["completion"] for one in chats.read_text().splitlines()]
    assert 12 * 3 < int(counted) < 12 * (max(map(len, lines)) + 2)


def test_inspect_shows_what_counts(cache: Path) -> None:
    sample = CacheReader(cache).sample(0)
    printed = done("inspect", cache, "--sample", sample["sample_id"].tobytes().hex())
    num = int(sample["segment"].max()) + 1
    assert len(re.findall(r"counts: 'it is \d+<\|done\|>'", printed)) == num
    assert "what is behind" in printed
    table = done("inspect", cache)
    assert f"positions that count: {int(sample['loss_mask'].sum())}" in printed
    assert "topk_ids" in table


def test_the_join_compares_templates(
    cache: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def tokenizer(name: str, template: str | None) -> Path:
        found = tiny_byte_level(SPECIAL)
        found.chat_template = template
        found.save_pretrained(tmp_path / name)
        return tmp_path / name

    same = ("check", "--cache", cache)
    assert "chat template" in done(*same, "--student-tokenizer", tokenizer("same", MARKED))
    assert "verified" in done(*same, "--student-tokenizer", tokenizer("none", None))
    spelled = MARKED.replace("{% for m in messages %}", "{% for m in messages -%} ")
    assert "verified" in done(*same, "--student-tokenizer", tokenizer("spelled", spelled))
    other = tokenizer("other", TRIMS)
    printed = refused(
        *same, "--student-tokenizer", other, code=1, saying=r"is not that of .* \(chat template\)"
    )
    assert "sha256" in printed
    let_pass = (*same, "--student-tokenizer", other, "--on-mismatch", "warn")
    assert "chat template" in done(*let_pass)


def test_students_of_other_tokens_and_of_texts_are_refused(
    cache: Path, tmp_path: Path, teacher: Path
) -> None:
    other = tiny_byte_level()
    other.add_tokens([f"word{number}" for number in range(9)])
    other.save_pretrained(tmp_path / "other")
    refused(
        "check", "--cache", cache, "--student-tokenizer", tmp_path / "other", "--align", "map",
        saying="holds conversations, whose control tokens another tokenizer does not read",
    )  # fmt: skip
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"text {n} of the texts"}) for n in range(20)))
    done(
        "cache-teacher", "--task", "lm", "--data", texts, "--teacher", teacher, "--out",
        tmp_path / "texts", "--top-k", "9",
    )  # fmt: skip
    done("train-student", "--cache", tmp_path / "texts", "--out", tmp_path / "run", *TINY_STUDENT)
    refused("predict", tmp_path / "run", "--chat", "what", saying="was trained on texts")


def test_options_of_conversations_are_of_language_models(teacher: Path, chats: Path) -> None:
    refused(
        "cache-teacher", "--data", "imdb", "--loss-on", "assistant",
        saying="--loss-on is of conversations, which language models read",
    )  # fmt: skip


def test_the_dry_run_knows_the_share_that_counts(teacher: Path, chats: Path) -> None:
    def bytes_of(*more: str) -> float:
        printed = done(
            "cache-teacher", "--task", "lm", "--data", chats, "--teacher", teacher, "--dry-run",
            "--end-of-turn", "<|done|>", *more,
        )  # fmt: skip
        return float(re.findall(r"bytes a token\D+([\d.]+)", printed)[0])

    assert bytes_of("--loss-on", "assistant") < 0.5 * bytes_of()
