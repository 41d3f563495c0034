"""Caches over a student's ids, from GPT-2's to SmolLM2's, against the model's own logits."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerBase,
)

from benchmarks.packaged_tokenizers import smollm2_tokenizer_folder
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.teacher.config import CaptureConfig
from teacher_cache.stages.teacher.options import check_options
from teacher_cache.stages.tokens.token_bytes import token_bytes
from teacher_cache.stages.tokens.vocabulary_map import MAP_FILE, exact_map, recorded_map
from teacher_cache.stages.verify import verify_deep
from tests.reference_mapping import mapped
from tests.small_caches import contents
from tests.tiny_models import tiny_language_model

NUM_ROWS = 50_304  # of the teacher's head; its tokenizer uses 50,257
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 16},
    "nucleus": {"codec": "topk", "top_p": 0.3, "exact": True, "temperatures": (1.0, 2.0)},
    "sampled": {"codec": "sampled", "num_draws": 20, "draw_temperature": 2.0},
}
TEXTS = ["It is a truth universally acknowledged, that a single man", "Dull.", "déjà vu 汉字 1813"]


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = tmp_path_factory.mktemp("tiny-lm")
    config = GPT2Config(vocab_size=NUM_ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    tiny_language_model(config).save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def longer(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """GPT-2's tokenizer with two tokens more: the teacher's table, padded."""
    folder = tmp_path_factory.mktemp("longer")
    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "sep_token": "<|sep|>"})
    tokenizer.save_pretrained(folder)
    return folder


def texts_of(folder: Path, texts: list[str]) -> Path:
    file = folder / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": one}) for one in texts))
    return file


def config_of(folder: Path, teacher: Path, student: Path, **changes: Any) -> CacheTeacherConfig:
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "task": "lm",
        "name": "texts",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": 16,
        "shard_documents": 2,
        "labeled": CorpusConfig(source=str(texts_of(folder, TEXTS)), labeled=False),
        "out": folder / "cache",
        "student_tokenizer": str(student),
    }
    return CacheTeacherConfig.of(**(values | changes))


def exact_logits(teacher: Path, sample: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[S, R] of each piece by itself, and each position's next token, -1 where there is none."""
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    found, following = [], []
    for piece in range(int(sample["segment"][-1]) + 1):
        ids = torch.from_numpy(sample["input_ids"][sample["segment"] == piece].astype(np.int64))
        with torch.no_grad():
            found.append(model(ids[None]).logits[0].numpy())
        following.append(np.append(ids[1:].numpy(), -1))
    return np.concatenate(found), np.concatenate(following)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_mapped_cache_is_the_models_distribution_mapped(
    name: str, tmp_path: Path, teacher: Path, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    student = smollm2_tokenizer_folder()
    config = config_of(tmp_path / name, teacher, student, align="map", **SETTINGS[name])
    cache = cache_teacher.run(config).cache
    assert verify(cache).problems == ()
    reader = CacheReader(cache)
    manifest = reader.manifest
    table, own = token_bytes(smollm2_tokenizer), manifest.settings["support"]
    assert (own["kind"], own["align"], own["size"]) == ("aligned", "map", 49_152)
    found_map = recorded_map(cache, manifest)
    assert found_map is not None and own["aligned"] == found_map.support
    found_map.require_student(table)
    assert MAP_FILE in manifest.teacher_files
    student_ids = found_map.student_ids
    codec = codec_from(manifest.settings["codec"])
    assert codec.support_size == 49_152
    sample = reader.sample(0)
    logits, following = exact_logits(teacher, sample)
    rows = {key: torch.from_numpy(np.array(one)) for key, one in codec.expand(sample).items()}
    for temperature in (1.0, 2.0):
        decoded = codec.decode(rows, temperature)
        assert decoded.ids is not None
        for position in range(0, len(logits), 3):
            wanted = mapped(logits[position, :50_257], student_ids, 49_152, temperature)
            ids = np.asarray(decoded.ids[position])
            filled = ids >= 0
            head = wanted.masses[ids[filled]]
            log_probs = np.asarray(decoded.log_probs[position])[filled]
            np.testing.assert_allclose(log_probs, np.log(head), atol=0.03)
            tail = float(torch.as_tensor(decoded.tail_log_prob)[position].exp())
            assert tail == pytest.approx(1 - head.sum(), abs=3e-3)
            if name != "sampled":
                largest = np.sort(wanted.masses)[::-1][: len(head)]
                np.testing.assert_allclose(np.sort(head)[::-1], largest, rtol=1e-4)
    at_one = torch.log_softmax(torch.from_numpy(logits[:, :50_257]).double(), dim=1).numpy()
    np.testing.assert_allclose(sample["top1_log_prob"], at_one.max(1), atol=0.01)
    counts = following >= 0
    own_next = at_one[np.arange(len(logits))[counts], following[counts]]
    np.testing.assert_allclose(sample["next_log_prob"][counts], own_next, atol=0.01)
    first = manifest.about["probe"]["reconstruction"][0]
    assert 0 < first["coverage"] < 1 and 0 <= first["kl"] < 1e-3
    assert first["lost_mass"] >= 1 - first["coverage"] - 1e-3
    assert verify_deep(cache, 3) < 1e-3


def test_an_aligned_cache_grows_is_mended_and_is_not_mixed(
    tmp_path: Path, teacher: Path, longer: Path
) -> None:
    student = smollm2_tokenizer_folder()
    config = config_of(tmp_path / "one", teacher, student, align="map", top_k=8)
    cache = cache_teacher.run(config).cache
    before = contents(cache)
    fewer = config_of(tmp_path / "two", teacher, student, align="map", top_k=8)
    two = fewer.labeled.model_copy(update={"max_samples": 2})
    assert cache_teacher.run(fewer.model_copy(update={"labeled": two})).num_shards_run == 1
    assert cache_teacher.run(fewer).num_shards_kept == 1
    grown = contents(tmp_path / "two" / "cache")
    shards = [name for name in before if name.endswith(".arrow")]
    assert len(shards) > 1 and all(grown[name] == before[name] for name in shards)
    (cache / "labeled/000/000001.arrow").unlink()
    (cache / "teacher" / MAP_FILE).unlink()
    result = cache_teacher.run(config)
    assert (result.num_shards_run, result.num_shards_kept) == (1, 1)
    assert contents(cache) == before
    for changes in ({"align": "none"}, {"student_tokenizer": str(longer)}):
        with pytest.raises(UserError, match=r"support\.\w+ is "):
            cache_teacher.run(config.model_copy(update=changes))


def test_a_map_that_is_not_the_caches(tmp_path: Path, teacher: Path) -> None:
    config = config_of(tmp_path / "one", teacher, smollm2_tokenizer_folder(), align="map", top_k=8)
    cache = cache_teacher.run(config).cache
    path = cache / "teacher" / MAP_FILE
    content = json.loads(path.read_text())
    own = token_bytes(AutoTokenizer.from_pretrained(cache / "teacher"))
    table = exact_map(own, own)
    content |= {
        "student_ids": table.student_ids.tolist(),
        "num_student_ids": table.num_student_ids,
        "student_sha256": table.student_sha256,
        "sha256": table.sha256,
    }
    path.write_text(json.dumps(content))
    with pytest.raises(CheckFailed, match="is not the map that"):
        recorded_map(cache, CacheReader(cache).manifest)


@pytest.mark.parametrize("codec", ["topk", "sampled", "hidden", "dense"])
def test_a_cut_cache_is_the_teachers_among_the_students_ids(
    codec: str, tmp_path: Path, teacher: Path, longer: Path
) -> None:
    folder = tmp_path / codec
    cut = config_of(folder, teacher, longer, align="truncate", codec=codec)
    plain = config_of(tmp_path / "plain", teacher, longer, codec=codec)
    caches = [cache_teacher.run(one).cache for one in (cut, plain)]
    readers = [CacheReader(cache) for cache in caches]
    supports = [reader.manifest.settings["support"] for reader in readers]
    assert [one["size"] for one in supports] == [50_259, 50_257]
    assert (supports[0]["kind"], supports[0]["align"]) == ("aligned", "truncate")
    ours, theirs = (reader.sample(0) for reader in readers)
    for name, field in theirs.items():
        if name == "dense_logits":
            assert np.array_equal(ours[name][:, :50_257], field)
            assert np.isneginf(ours[name][:, 50_257:]).all()
        else:
            assert np.array_equal(ours[name], field), name
    assert verify_deep(caches[0], 2) < 1e-3


def test_cutting_is_refused_where_ids_mean_other_strings(tmp_path: Path, teacher: Path) -> None:
    config = config_of(tmp_path / "one", teacher, smollm2_tokenizer_folder(), align="truncate")
    with pytest.raises(CheckFailed, match=r"--align truncate needs .* at 49,152, 9.*--align map"):
        cache_teacher.run(config)
    assert not (tmp_path / "one" / "cache").exists()


def test_without_an_alignment_the_log_says_what_cutting_would_have_meant(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path / "one", teacher, smollm2_tokenizer_folder(), top_k=4)
    with caplog.at_level(logging.INFO, logger="teacher_cache"):
        cache = cache_teacher.run(config).cache
    assert "cut at 49,152, " in caplog.text
    manifest = CacheReader(cache).manifest
    assert manifest.settings["support"]["kind"] == "teacher"
    vocabularies = manifest.about["vocabularies"]
    assert vocabularies["relation"] == "different" and vocabularies["num_below_cut"] == 49_152
    assert recorded_map(cache, manifest) is None


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ({"task": "classification", "align": "map"}, "--align is of language models"),
        (
            {"task": "classification", "student_tokenizer": "t"},
            "--student-tokenizer is of language models",
        ),
        ({"align": "map"}, "--align map needs the ids that it aligns to"),
        ({"align": "truncate"}, "--align truncate needs the ids that it aligns to"),
        (
            {"align": "map", "student_tokenizer": "t", "codec": "hidden"},
            "--codec hidden keeps the teacher's whole distribution",
        ),
        (
            {"align": "map", "student_tokenizer": "t", "codec": "dense"},
            "--codec dense keeps the teacher's whole distribution",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], saying: str) -> None:
    config = CaptureConfig.model_validate({"task": "lm", "teacher": "t"} | options)
    with pytest.raises(UserError, match=saying):
        check_options(config)


def test_a_head_leaves_an_outcome_for_what_no_student_id_means(
    tmp_path: Path, teacher: Path
) -> None:
    config = config_of(
        tmp_path / "one", teacher, smollm2_tokenizer_folder(), align="map", top_k=49_152
    )
    with pytest.raises(UserError, match=r"--top-k 49152 cannot be: .* so give 1 to "):
        cache_teacher.run(config)
