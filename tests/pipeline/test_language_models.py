"""A language model's cache as a user makes and reads it, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.options import CacheTeacherOptions
from teacher_cache.pipeline.presets import resolve_cache_teacher
from tests.command_line import done, pipe, refused
from tests.tiny_models import write_tiny_language_model

pytestmark = pytest.mark.usefixtures("no_network")

PROSE = (
    "Emma Woodhouse, handsome, clever, and rich.\n\nShe was the youngest\nof the two daughters.\n\n"
)


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), gpt2_tokenizer)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prose") / "emma.txt"
    file.write_text(PROSE * 3)
    return file


def command(prose: Path, teacher: Path, cache: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return (
        "cache-teacher", "--task", "lm", "--data", prose, "--teacher", teacher, "--out", cache,
        "--txt-unit", "paragraph", "--max-length", "24", "--shard-documents", "4", *more,
    )  # fmt: skip


def made_by(
    tmp_path_factory: pytest.TempPathFactory, prose: Path, teacher: Path, codec: str
) -> Path:
    cache = tmp_path_factory.mktemp("caches") / codec
    done(*command(prose, teacher, cache, "--codec", codec))
    return cache


@pytest.fixture(scope="module")
def topk_cache(tmp_path_factory: pytest.TempPathFactory, prose: Path, teacher: Path) -> Path:
    return made_by(tmp_path_factory, prose, teacher, "topk")


@pytest.fixture(scope="module")
def hidden_cache(tmp_path_factory: pytest.TempPathFactory, prose: Path, teacher: Path) -> Path:
    return made_by(tmp_path_factory, prose, teacher, "hidden")


def rows(printed: str) -> dict[str, str]:
    """The lines of tables of two columns."""
    cells = [line.split("│")[1:3] for line in printed.splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in cells}


def test_a_paragraph_is_a_document(topk_cache: Path) -> None:
    manifest = read_manifest(topk_cache)
    assert manifest.splits["labeled"].num_documents == 6
    assert manifest.settings["data"]["labeled"]["txt_unit"] == "paragraph"
    assert list(manifest.splits) == ["labeled"]


def test_inspect_says_what_a_token_takes_and_what_is_lost(topk_cache: Path) -> None:
    found = rows(done("inspect", topk_cache))
    assert found["bytes of topk_ids"] == "128.00" and found["bytes of topk_values"] == "64.00"
    assert found["bytes of segment"] == "2.00"
    assert found["bytes in all"] == "225.00 (topk)"
    (first, _) = read_manifest(topk_cache).about["probe"]["reconstruction"]
    assert found["captured mass at temperature 1"] == f"{1 - first['lost_mass']:.4f}"
    assert found["reconstruction KL at temperature 1"].startswith(f"{first['kl']:.2g} nats")
    assert "reconstruction KL at temperature 2" in found
    assert found["mass of unused rows"] == "0"


@pytest.mark.parametrize("codec", ["topk", "hidden"])
def test_inspect_measures_what_the_manifest_does_not_hold(
    codec: str, topk_cache: Path, hidden_cache: Path
) -> None:
    cache = topk_cache if codec == "topk" else hidden_cache
    printed = json.loads(done("inspect", cache, "--json"))
    found = printed.pop("measured")["labeled"]
    assert printed == json.loads((cache / "manifest.json").read_text())
    reader = CacheReader(cache)
    samples = [reader.sample(i) for i in range(len(reader))]
    lengths = [len(one["input_ids"]) for one in samples]
    assert found["lengths"]["mean"] == pytest.approx(np.mean(lengths))
    assert found["lengths"]["largest"] == max(lengths) and found["num_read"] == len(samples)
    assert sum(num for _, _, num in found["lengths"]["bins"]) == len(samples)
    for low, high, num in found["lengths"]["bins"]:
        assert num == sum(low < one <= high for one in lengths)
    top = np.concatenate([np.exp(one["top1_log_prob"][one["loss_mask"]]) for one in samples])
    assert found["confidence"]["num"] == len(top)
    assert found["confidence"]["mean"] == pytest.approx(top.mean(), rel=1e-3)
    if codec == "topk":
        (first, _) = printed["about"]["probe"]["reconstruction"]
        assert found["captured_mass"]["mean"] == pytest.approx(1 - first["lost_mass"], abs=0.05)
    else:
        assert found["captured_mass"] is None, "nothing lies outside a whole distribution"
    sizes = found["bytes_per_sample"]
    assert sizes["input_ids"] == pytest.approx(4 * np.mean(lengths))
    shown = done("inspect", cache)
    assert "labeled: tokens of a sample" in shown and "█" in shown
    assert ("captured mass: mean" in shown) == (codec == "topk")


@pytest.mark.parametrize("codec", ["topk", "hidden"])
def test_inspect_decodes_a_sample(
    codec: str, topk_cache: Path, hidden_cache: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    cache = topk_cache if codec == "topk" else hidden_cache
    reader = CacheReader(cache)
    sample = reader.sample(0)
    printed = done("inspect", cache, "--sample", sample["sample_id"].tobytes().hex())
    assert "Emma Woodhouse" in printed or "She was" in printed
    tokens = gpt2_tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
    lines = re.findall(r"at (\d+), (\S+): next is (\S+) .*, (.*)\); T=1: (.*)", printed)
    assert len(lines) == int(sample["loss_mask"].sum()), "every position that counts"
    for position, here, following, rank, most_probable in lines:
        assert (here, following) == (tokens[int(position)], tokens[int(position) + 1])
        listed = re.findall(r"(\S+) \d\.\d{4}", most_probable)
        marked = [place for place, one in enumerate(listed, 1) if one == f"→{following}"]
        is_listed = rank in {f"rank {place}" for place in range(1, 6)}
        assert [f"rank {place}" for place in marked] == [rank] * is_listed
        assert codec == "topk" or rank != "not kept", "a whole distribution has every token"
        assert len(re.findall(r" \d\.\d{4}", most_probable)) == (6 if codec == "topk" else 5)
        assert ("all others" in most_probable) == (codec == "topk")


@pytest.mark.parametrize("codec", ["topk", "hidden"])
def test_verify_reads_the_bytes_and_asks_the_teacher_again(
    codec: str, topk_cache: Path, hidden_cache: Path
) -> None:
    cache = topk_cache if codec == "topk" else hidden_cache
    printed = done("verify", cache, "--deep", "2")
    found = re.search(r"distributions as cached: largest KL of a position (\S+) nats", printed)
    assert found and abs(float(found[1])) < 1e-4


def test_verify_refuses_another_teacher(
    topk_cache: Path, tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    other = write_tiny_language_model(tmp_path / "other", gpt2_tokenizer, seed=1)
    refused(
        "verify", topk_cache, "--deep", "1", "--teacher", other, code=1, saying="has other weights"
    )


def test_the_same_command_again_computes_nothing(
    topk_cache: Path, prose: Path, teacher: Path
) -> None:
    printed = done(*command(prose, teacher, topk_cache, "--codec", "topk"))
    assert "0 shards computed, 2 kept" in printed


def test_a_dry_run_probes_what_is_on_this_machine(
    prose: Path, teacher: Path, topk_cache: Path, tmp_path: Path
) -> None:
    found = rows(done(*command(prose, teacher, tmp_path / "none", "--dry-run")))
    summary = read_manifest(topk_cache).splits["labeled"]
    assert found["bytes a token"] == "225.0"
    assert found["tokens"] == f"{summary.num_tokens:,}"
    assert found["shards"] == f"{summary.num_shards}"
    assert "nats" in found["reconstruction KL at temperature 1"]
    assert not (tmp_path / "none").exists()


def test_a_dry_run_without_the_teacher_computes_the_bytes(prose: Path) -> None:
    asked = ("cache-teacher", "--task", "lm", "--data", prose, "--teacher", "gpt2", "--dry-run")
    found = rows(done(*asked))
    assert found["bytes a token"] == "225.0 (if the teacher has at most 65,536 ids)"
    assert found["tokens"] == found["MB"] == "–"
    assert found["reconstruction KL"].startswith("not probed")
    assert rows(done(*asked, "--codec", "hidden"))["bytes a token"] == "–"


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--label-column", "x"), "--label-column is of classifiers"),
        (("--label-names", "a,b"), "--label-names is of classifiers"),
        (("--hidden", "pooled"), "--hidden pooled is of classifiers"),
        (("--views", "1"), "--views 1 is of classifiers"),
        (("--num-draws", "3"), "--num-draws is of --codec sampled"),
        (("--codec", "dense", "--top-k", "3"), "--top-k is of --codec topk"),
        (("--top-k", "0"), "--top-k 0 cannot be"),
        (("--temperatures", "2,1"), "--temperatures 2,1 is no grid"),
        (("--unlabeled-split", "x"), "--unlabeled-split is of a second corpus"),
        (("--max-length", "9999"), "--max-length 9999 is more than"),
    ],
)
def test_what_has_no_meaning_is_refused(
    options: tuple[str, ...], saying: str, prose: Path, teacher: Path, tmp_path: Path
) -> None:
    refused(*command(prose, teacher, tmp_path / "cache"), *options, saying=saying)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("option", [("--codec", "topk"), ("--top-k", "5"), ("--no-exact",)])
def test_a_classifier_has_no_codec(option: tuple[str, ...]) -> None:
    asked = ("cache-teacher", "--data", "imdb", "--dry-run", *option)
    assert "of language models, and this run caches a classifier" in pipe(*asked).error


def test_the_presets_task() -> None:
    options = CacheTeacherOptions.of(data="austen", teacher="t")
    config = resolve_cache_teacher(options)
    assert (config.task, config.name, config.unlabeled) == ("lm", "austen", None)
    labeled = config.labeled
    assert (labeled.source, labeled.split, labeled.labeled) == ("austen", "train", False)
    assert (
        "names no language model: give --teacher"
        in pipe("cache-teacher", "--data", "austen", "--dry-run").error
    )
    refused("cache-teacher", "--data", "austn", "--dry-run", saying="did you mean 'austen'")


def test_a_classifiers_data_serves_as_text() -> None:
    options = CacheTeacherOptions.of(
        data="imdb", task="lm", teacher="t", unlabeled="imdb", unlabeled_max_samples=7
    )
    config = resolve_cache_teacher(options)
    assert (config.labeled.source, config.labeled.split) == ("stanfordnlp/imdb", "train")
    assert config.labeled.text_column == "text" and not config.labeled.labeled
    assert config.unlabeled is not None
    assert (config.unlabeled.split, config.unlabeled.max_samples) == ("unsupervised", 7)


def test_a_run_refuses_at_once_what_its_evaluation_would_at_the_end(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("cache_teacher: {data: austen, teacher: t}\nevaluate: {max_samples: 3}\n")
    refused("run", "--config", config, saying="--max-samples is of text, and --cache takes its")
