"""A cache from an engine's answers: the document's own programs, kills, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest, read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_log_probs as stage
from teacher_cache.stages.cache_log_probs import Engine, LogProbFile, cache_log_probs
from tests.command_line import done, refused
from tests.small_caches import contents
from tests.tiny_models import tiny_language_model

DOCUMENT = (Path(__file__).parents[2] / "docs" / "own-cache.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
TEXTS = [
    f"{person} had been {feeling} by the {thing}, and said so."
    for person in ("Emma", "Mr. Knightley", "Harriet")
    for feeling, thing in (("vexed", "rain"), ("charmed", "ball"), ("tired", "visit"))
]


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A tiny GPT-2 of 300 ids."""
    assert isinstance(gpt2_tokenizer, PreTrainedTokenizerFast)
    tokenizer = gpt2_tokenizer.train_new_from_iterator(TEXTS, 300)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    folder = tmp_path_factory.mktemp("teacher")
    tiny_language_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A folder in which the document's programs ran."""
    folder = tmp_path_factory.mktemp("own")
    names: dict[str, Any] = {"TEACHER": str(teacher), "TEXTS": TEXTS}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for program in PROGRAMS:
            exec(program, names)
    return folder


@pytest.fixture
def tokenizer(place: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "caches" / "mine" / "teacher")


def write(file: Path, cache: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Manifest:
    options: dict[str, Any] = {"top_k": 5, "max_length": 64, "shard_documents": 4}
    engine = Engine(name="transformers", model="tiny")
    return cache_log_probs(
        cache, LogProbFile(file), tokenizer=tokenizer, engine=engine, **(options | changes)
    )


def test_the_programs_cache_holds_what_the_model_says(place: Path, teacher: Path) -> None:
    reader = CacheReader(place / "caches" / "mine")
    assert verify(reader.cache).problems == ()
    codec: Any = codec_from(reader.manifest.settings["codec"])
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    num = 0
    for sample_idx in range(len(reader)):
        sample = reader.sample(sample_idx)
        decoded = codec.decode(codec.expand(sample), 1.0)
        for segment in np.unique(sample["segment"]):
            places = np.flatnonzero(sample["segment"] == segment)
            ids = torch.from_numpy(sample["input_ids"][places].astype(np.int64))
            with torch.no_grad():
                exact = model(ids[None]).logits[0].double().log_softmax(-1).numpy()
            assert sample["loss_mask"][places].tolist() == [True] * (len(places) - 1) + [False]
            for row, at, real in zip(exact, places[:-1], ids[1:].tolist(), strict=False):
                head = decoded.ids[at]
                np.testing.assert_allclose(decoded.log_probs[at], row[head], atol=6e-3)
                tail = np.exp(np.delete(row, head)).sum()
                assert np.exp(decoded.tail_log_prob[at]) == pytest.approx(tail, rel=6e-3)
                assert sample["next_log_prob"][at] == pytest.approx(row[real], abs=6e-3)
                num += 1
    assert num == reader.manifest.splits["labeled"].num_tokens - len(TEXTS)


def test_the_documents_commands_run(
    place: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    commands = re.findall(r"^    pipe (.*)$", DOCUMENT, re.MULTILINE)
    making, *commands = [one.replace("TEACHER", str(teacher)) for one in commands]
    before = contents(place / "caches" / "mine")
    done(*making.split())
    assert contents(place / "caches" / "mine") == before, "the program made the same cache"
    assert len(commands) == 2
    printed = done(*commands[0].split())
    assert "not probed" in printed and "transformers" in printed
    tiny = ("--d-model", "8", "--num-layers", "1", "--expand", "2", "--d-state", "4",
            "--head-dim", "8", "--max-steps", "2", "--batch-size", "2", "--device", "cpu",
            "--eval-fraction", "0.3")  # fmt: skip
    printed = done(*commands[1].split(), *tiny)
    assert "✓ tokenization verified" in printed
    assert "kl" in printed
    cache = ("--cache", "caches/mine", "--out", tmp_path / "run", *tiny)
    refused("train-student", *cache, saying=r"temperature 2 is outside the grid of the cache \(1\)")
    refused("verify", "caches/mine", "--deep", "1", saying="there is no teacher here to ask again")


def test_the_manifest_says_what_is_known(place: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    manifest = read_manifest(place / "caches" / "mine")
    recorded = manifest.settings["teacher"]
    assert (recorded["engine"], recorded["dtype"]) == ("transformers", "float32")
    assert recorded["weights_sha256"] is None
    assert "probe" not in manifest.about
    (sidecar,) = [
        json.loads(path.read_text())
        for path in (place / "caches" / "mine" / "labeled").rglob("*.json")
    ]
    facts = sidecar["environment"]
    assert facts["num_positions"] == manifest.splits["labeled"].num_tokens - len(TEXTS)
    assert facts["num_tails_below_resolution"] == 0 and 0 < facts["largest_sum"] < 1


def test_killed_and_called_again_it_is_the_same_cache(
    place: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place / "answers.jsonl"
    more = {"unlabeled": LogProbFile(file)}
    write(file, tmp_path / "whole", tokenizer, **more)
    num_read: list[int] = []
    real = stage.packed_fields

    def dies_at_the_third(*args: Any, **named: Any) -> Any:
        num_read.append(1)
        if len(num_read) == 3:
            raise KeyboardInterrupt
        return real(*args, **named)

    monkeypatch.setattr(stage, "packed_fields", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(file, tmp_path / "killed", tokenizer, **more)
    assert not read_manifest(tmp_path / "killed").complete
    write(file, tmp_path / "killed", tokenizer, **more)
    assert len(num_read) == 7  # six shards, one of them twice
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    write(file, tmp_path / "killed", tokenizer, **more)
    assert len(num_read) == 7
    with pytest.raises(UserError, match=r"codec\.top_k is 5 there and 4 in this"):
        write(file, tmp_path / "killed", tokenizer, **more, top_k=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one | {"text": "Another one."}, "document 2 has other tokens than the token"),
        (lambda one: one | {"prompt_logprobs": [None]}, "document 2 has 1 lists for"),
        (lambda one: {"text": "No more."}, "document 2 cannot be read .KeyError: 'prompt_logprob"),
        (lambda one: [1], "document 2 cannot be read"),
        (lambda one: one | {"prompt_token_ids": []}, "has 0 tokens, expected 1 to 64"),
    ],
)
def test_refuses_what_is_no_answer(
    place: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    change: Callable[[Any], Any],
    words: str,
) -> None:
    lines = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    lines[1] = change(lines[1])
    file = tmp_path / "answers.jsonl"
    write_bytes_atomically(file, "\n".join(json.dumps(one) for one in lines).encode())
    with pytest.raises(UserError, match=words):
        write(file, tmp_path / "cache", tokenizer)


def test_refuses_documents_that_are_too_long_and_files_that_are_not_there(
    place: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match="tokens, expected 1 to 8: raise max_length"):
        write(place / "answers.jsonl", tmp_path / "cache", tokenizer, max_length=8)
    with pytest.raises(UserError, match="is no file"):
        write(place / "none.jsonl", tmp_path / "cache", tokenizer)


def test_warns_where_every_list_holds_all_the_mass(
    place: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As an engine's own top-k leaves it."""
    lines = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        for entry in line["prompt_logprobs"][1:]:
            kept = dict(sorted(entry.items(), key=lambda one: -one[1]["logprob"])[:20])
            total = np.logaddexp.reduce([one["logprob"] for one in kept.values()])
            entry.update({i: {"logprob": -80.0} for i in entry.keys() - kept.keys()})
            entry.update({i: {"logprob": one["logprob"] - total} for i, one in kept.items()})
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in lines))
    write(file, tmp_path / "cache", tokenizer, top_k=20)
    assert caplog.text.count("every list holds all the mass") == 1
