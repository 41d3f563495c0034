"""Stage two on a cache of another tokenizer, from the shards alone, as a user runs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerBase,
)

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages import train_student
from teacher_cache.stages.join.join import TokenizationMismatch
from teacher_cache.stages.tokens.tokenizers import save_tokenizer
from teacher_cache.stages.tokens.vocabulary_map import read_map
from teacher_cache.stages.training.config import TrainStudentConfig
from teacher_cache.stages.training.run_folder import read_run
from tests.command_line import done, refused
from tests.stages.test_train_language_model import TEXTS, DiesAt, Interruption
from tests.tiny_language_models import WIDTH, tiny_teacher, write_cache
from tests.tiny_models import tiny_language_model
from tests.tiny_runs import result_files, result_log, student_config
from tests.tiny_tokenizers import tiny_sentencepiece

pytestmark = pytest.mark.usefixtures("tokenizers_read_once")

ODD_TEXTS = ["go 🚀 日本語 <|endoftext|> naïve 1984", "", "x", " \x00\x1d\ufffd "]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(folder, gpt2_tokenizer)
    return folder


def made(folder: Path, codec: Codec, tokenizer: PreTrainedTokenizerBase) -> Path:
    texts = [*TEXTS, *ODD_TEXTS]
    return write_cache(folder, codec, tokenizer, texts, tiny_teacher(len(tokenizer)))


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A teacher of SmolLM2's 49,152 ids."""
    codec = TopKCodec(support_size=len(smollm2_tokenizer), top_k=8)
    return made(tmp_path_factory.mktemp("caches") / "smollm2", codec, smollm2_tokenizer)


def config(cache: Path, run: Path, tokenizer: Path, **changes: Any) -> TrainStudentConfig:
    settings: dict[str, Any] = {
        "student_tokenizer": str(tokenizer), "batch_size": 2, "eval_fraction": 0.3, "lr": 0.02,
        "alpha": 0.5, "temperature": 1.0,
    }  # fmt: skip
    return student_config(cache, run, **(settings | changes))


@pytest.mark.parametrize("align", ["map", "spans"])
def test_learns_in_tokens_of_its_own(align: str, cache: Path, gpt2: Path, tmp_path: Path) -> None:
    run = train_student.run(config(cache, tmp_path / "run", gpt2, align=align)).run
    evaluations = [line for line in result_log(run) if "eval_ce" in line]
    assert evaluations[-1]["eval_ce"] < evaluations[0]["eval_ce"]
    assert {"eval_bits_per_byte", "eval_teacher_bits_per_byte"} <= evaluations[0].keys()
    assert ("eval_chunks" in evaluations[0]) == (align == "spans")
    record = read_run(run)
    assert record.settings["align"] == record.settings["alignment"]["kind"] == align
    assert record.settings["alignment"]["map_sha256"] == read_map(run).sha256
    assert 0.7 < record.about["coverage"]["positions"] <= 1
    model: Any = AutoModelForCausalLM.from_pretrained(run)
    assert model.config.vocab_size == 50257 and model.config.eos_token_id == 50256


def test_a_projection_goes_on_bit_for_bit_after_a_kill(
    cache: Path, gpt2: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "align": "projection", "projection_start": 0.0, "projection_end": 0.5,
        "projection_candidates": 3,
    }  # fmt: skip
    whole = train_student.run(config(cache, tmp_path / "whole", gpt2, **changes)).run
    learned = load_file(whole / "projection.safetensors")
    assert learned["student_ids"].shape == learned["weights"].shape == (49152, 3)
    sums = learned["weights"].sum(dim=1)
    placed = (learned["student_ids"] >= 0).any(dim=1)
    torch.testing.assert_close(sums, placed.float())
    begun = torch.tensor([0.9, 0.05, 0.05])
    three = learned["weights"][(learned["student_ids"] >= 0).all(dim=1)]
    assert (three - begun).abs().max() > 1e-3  # some of them moved
    killed = config(cache, tmp_path / "killed", gpt2, **changes)
    with pytest.raises(Interruption):
        train_student.run(killed, DiesAt(5))
    assert result_files(train_student.run(killed).run) == result_files(whole)


def test_a_projection_begins_with_what_two_tables_find_alike(
    sentencepiece_folder: Path, gpt2: Path, cache: Path, tmp_path: Path
) -> None:
    """The teacher's is the head in its cache, the student's that of a model of its tokenizer."""
    teacher = AutoTokenizer.from_pretrained(sentencepiece_folder)
    codec = HiddenCodec(support_size=len(teacher), width=WIDTH)
    hidden = made(tmp_path / "cache", codec, teacher)
    model = tiny_language_model(GPT2Config(vocab_size=50257, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(gpt2)
    settings = {"align": "projection", "projection_embeddings": str(gpt2), "max_steps": 2}
    run = train_student.run(config(hidden, tmp_path / "run", gpt2, **settings)).run
    learned = load_file(run / "projection.safetensors")
    assert (learned["student_ids"] >= 0).any(dim=1).all()
    found = read_run(run).settings
    assert "projection_embeddings" not in found and len(found["projection_sha256"]) == 64
    with pytest.raises(UserError, match="the cache holds none"):
        train_student.run(config(cache, tmp_path / "other", gpt2, **settings))
    settings["projection_embeddings"] = str(sentencepiece_folder)
    with pytest.raises(CheckFailed, match="are not those of the student's tokenizer"):
        train_student.run(config(hidden, tmp_path / "other", gpt2, **settings))


def test_drawn_targets_are_mapped_too(
    smollm2_tokenizer: PreTrainedTokenizerBase,
    gpt2: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By their counts for the forward KL; for all else as a head, and that is said."""
    caplog.set_level(logging.INFO)
    codec = SampledCodec(support_size=len(smollm2_tokenizer), num_draws=8)
    cache = made(tmp_path / "cache", codec, smollm2_tokenizer)
    run = train_student.run(config(cache, tmp_path / "run", gpt2, align="map", max_steps=2)).run
    steps = [line for line in result_log(run) if "loss" in line]
    assert steps and all(1 < line["effective_draws"] <= 8 for line in steps)
    assert "coarse" not in caplog.text
    for changes in ({"align": "map", "divergence": "jsd"}, {"align": "projection"}):
        caplog.clear()
        out = tmp_path / changes["align"]
        train_student.run(config(cache, out, gpt2, max_steps=1, **changes))
        assert (
            f"coarse: --{'divergence jsd' if 'divergence' in changes else 'align'}" in caplog.text
        )


def test_a_student_of_a_begin_of_sequence(
    cache: Path, tmp_path: Path, sentencepiece_folder: Path
) -> None:
    settings = {"align": "spans", "max_steps": 2}
    run = train_student.run(config(cache, tmp_path / "run", sentencepiece_folder, **settings)).run
    found = read_run(run).about["coverage"]
    assert found["positions"] > 0.1 and found["chunks_a_token"] > 0.1


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_tokenizer(folder, tiny_sentencepiece())
    return folder


def test_without_an_alignment_other_ids_never_pass(cache: Path, gpt2: Path, tmp_path: Path) -> None:
    for on_mismatch in ("error", "warn"):
        wanted = config(cache, tmp_path / "run", gpt2, on_mismatch=on_mismatch)
        with pytest.raises(
            TokenizationMismatch, match="--align map, spans or projection"
        ) as raised:
            train_student.run(wanted)
        assert "36,961 strings are shared" in str(raised.value)
        assert "of the student's positions have the teacher's distribution" in str(raised.value)
    with pytest.raises(CheckFailed, match="--align truncate needs ids that mean the same"):
        train_student.run(config(cache, tmp_path / "run", gpt2, align="truncate"))
    assert not (tmp_path / "run").exists()


def test_another_alignment_is_another_run(cache: Path, gpt2: Path, tmp_path: Path) -> None:
    train_student.run(config(cache, tmp_path / "run", gpt2, align="map", max_steps=2))
    with pytest.raises(UserError, match="align is 'map' there and 'spans' in this command"):
        train_student.run(config(cache, tmp_path / "run", gpt2, align="spans", max_steps=2))


def test_a_longer_table_is_padded_and_cut(
    gpt2_tokenizer: PreTrainedTokenizerBase, gpt2: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "longer"
    settings = json.loads((gpt2 / "tokenizer.json").read_text())
    added = settings["added_tokens"][0] | {"id": 50257, "content": "<new>", "special": False}
    settings["added_tokens"].append(added)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_bytes((gpt2 / "tokenizer_config.json").read_bytes())
    longer = AutoTokenizer.from_pretrained(folder)
    assert len(longer) == 50258
    short = made(tmp_path / "short", TopKCodec(support_size=50257, top_k=4), gpt2_tokenizer)
    result = train_student.run(config(short, tmp_path / "padded", folder, max_steps=2))
    assert result.record.settings["alignment"]["kind"] == "pad"
    long = made(tmp_path / "long", TopKCodec(support_size=50258, top_k=4), longer)
    with pytest.raises(TokenizationMismatch):
        train_student.run(config(long, tmp_path / "cut", gpt2, max_steps=2))
    cut = config(long, tmp_path / "cut", gpt2, align="truncate", max_steps=2)
    assert train_student.run(cut).record.settings["alignment"]["kind"] == "truncate"
    whole = made(tmp_path / "whole", DenseCodec(support_size=50258), longer)
    cut = config(whole, tmp_path / "whole-cut", gpt2, align="truncate", max_steps=2)
    # All of the student's ids are in the head, so nothing is left that a ghost could stand for.
    assert all(
        0 < line["kd"] < 10 for line in result_log(train_student.run(cut).run) if "kd" in line
    )


def test_check_says_what_an_alignment_reaches(cache: Path, gpt2: Path) -> None:
    command = ("check", "--cache", cache, "--student-tokenizer", gpt2)
    printed = refused(*command, code=1, saying="strings are shared .* --align|--align .*strings")
    assert "tokenization differs" in printed
    assert "✓ aligned by spans: of the teacher's 49,152 ids 20" in done(
        *command, "--align", "spans"
    )
    refused(*command, "--align", "pad", code=1, saying="--align pad needs ids")


def test_options_of_a_projection_need_one(cache: Path) -> None:
    command = ("train-student", "--cache", cache, "--projection-candidates", "2")
    refused(*command, saying="only --align projection takes --projection-candidates")
    more = ("--align", "projection", "--projection-start", "0.9")
    refused(*command, *more, saying="--projection-end 0.5 comes before --projection-start 0.9")
