"""A language model's cache, codec by codec, against the model on each piece of a document alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.interface import Codec, Decoded
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import bytes_per_position
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.codecs.measure import measured_temperatures
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.losses.draws import SampledTargets
from teacher_cache.stages.models.head import read_language_model_head
from teacher_cache.stages.training.targets import CachedTargets
from tests.small_caches import contents
from tests.tiny_models import write_tiny_language_model

MAX_LENGTH = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 20},
    "exact": {"codec": "topk", "exact": True},
    "nucleus": {"codec": "topk", "top_p": 0.02, "temperatures": (1.0, 2.0)},
    "sampled": {"codec": "sampled", "num_draws": 9, "draw_temperature": 1.5},
    "distinct": {"codec": "sampled", "num_ids": 9, "draw_temperature": 1.5},
    "hidden": {"codec": "hidden"},
    "dense": {"codec": "dense"},
}
# Nats, of a log-prob: 8 bits for a head, f16 normalisers of draws, f16 states through a head.
TOLERANCE = {"topk": 0.03, "nucleus": 0.03, "sampled": 0.02, "distinct": 0.05, "hidden": 0.02}
HALF = 0.01  # of f16 at 10 nats


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), gpt2_tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, acl_imdb: Path) -> Path:
    """Some real reviews, one of them cut short, and what is hard: nothing, one word, no Latin."""
    reviews = [path.read_text() for path in sorted(acl_imdb.glob("train/pos/*.txt"))[:4]]
    documents = [reviews[0], "", "Dull.", reviews[1][:90], "汉字 \U0001f9e1", reviews[2][:200]]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": one}) for one in documents))
    return file


@pytest.fixture(scope="module")
def cached(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, texts: Path
) -> Callable[[str], Path]:
    """A codec's cache, made once; only to be read."""
    made: dict[str, Path] = {}

    def cache_of(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("caches") / name
            made[name] = cache_teacher.run(config_of(folder, teacher, texts, name)).cache
        return made[name]

    return cache_of


def config_of(
    folder: Path, teacher: Path, texts: Path, name: str, **changes: Any
) -> CacheTeacherConfig:
    values: dict[str, Any] = {
        "task": "lm",
        "name": "texts",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": MAX_LENGTH,
        "shard_documents": 3,
        "labeled": CorpusConfig(source=str(texts), labeled=False),
        "out": folder,
    }
    return CacheTeacherConfig.of(**(values | SETTINGS[name] | changes))


def codec_of(cache: Path, manifest: Manifest) -> Codec:
    codec = codec_from(manifest.settings["codec"])
    if isinstance(codec, HiddenCodec):
        return replace(codec, head=read_language_model_head(cache, manifest))
    return codec


def pieces(sample: dict[str, np.ndarray]) -> Iterator[slice]:
    borders = np.flatnonzero(np.diff(sample["segment"].astype(int), prepend=-1))
    for start, stop in zip(borders, [*borders[1:], len(sample["segment"])], strict=True):
        yield slice(int(start), int(stop))


def decoded(codec: Codec, sample: dict[str, np.ndarray], temperature: float) -> Decoded:
    rows = {name: torch.from_numpy(np.array(one)) for name, one in codec.expand(sample).items()}
    with torch.inference_mode():
        return codec.decode(rows, temperature)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_cached_is_what_the_model_says_of_each_document_alone(
    name: str, cached: Callable[[str], Path], teacher: Path
) -> None:
    cache = cached(name)
    reader = CacheReader(cache)
    codec = codec_of(cache, reader.manifest)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    num_pieces = 0
    for sample_idx in range(len(reader)):
        sample = reader.sample(sample_idx)
        assert len(sample["input_ids"]) <= MAX_LENGTH
        for temperature in measured_temperatures(codec):
            found = decoded(codec, sample, temperature)
            for piece in pieces(sample):
                ids = torch.from_numpy(sample["input_ids"][piece].astype(np.int64))
                with torch.no_grad():
                    logits = model(ids[None]).logits[0].double()
                exact = torch.log_softmax(logits / temperature, dim=1)
                check_piece(name, found, piece, exact)
                at_one = torch.log_softmax(logits, dim=1)
                check_always(sample, piece, ids, at_one)
                num_pieces += 1
    assert num_pieces >= 10  # of five documents, at two temperatures


def check_piece(name: str, found: Decoded, piece: slice, exact: torch.Tensor) -> None:
    log_probs, tail = found.log_probs[piece].double(), found.tail_log_prob[piece].double()
    if found.ids is None:
        kept = exact
    else:
        ids = found.ids[piece]
        filled = ids >= 0
        kept = exact.gather(1, ids.clamp(min=0)).where(filled, -torch.inf)
        mass = kept.exp().sum(1)
        np.testing.assert_allclose(tail.exp(), 1 - mass, atol=2e-3)
        if name not in ("sampled", "distinct"):
            largest = exact.topk(ids.shape[1]).values.where(filled, -torch.inf)
            np.testing.assert_allclose(kept, largest, atol=1e-5)
    np.testing.assert_allclose(log_probs, kept, atol=TOLERANCE.get(name, HALF))
    total = torch.logaddexp(torch.logsumexp(log_probs, 1), tail)
    np.testing.assert_allclose(total, 0, atol=1e-5)


def check_always(
    sample: dict[str, np.ndarray], piece: slice, ids: torch.Tensor, exact: torch.Tensor
) -> None:
    """Masks, and the log-probs of the next token and of the first."""
    expected = np.append(exact[:-1].gather(1, ids[1:, None])[:, 0].numpy(), 0)
    np.testing.assert_allclose(sample["next_log_prob"][piece], expected, atol=HALF)
    np.testing.assert_allclose(sample["top1_log_prob"][piece], exact.amax(1), atol=HALF)
    assert sample["loss_mask"][piece].tolist() == [True] * (len(ids) - 1) + [False]


def weights_at(codec: Codec, stored: dict[str, torch.Tensor], t: float) -> np.ndarray:
    """What the draws count at a temperature."""
    targets = CachedTargets(
        codec=codec, stored=stored, temperature=t, num_outcomes=codec.support_size
    ).at_positions(slice(None))
    assert isinstance(targets, SampledTargets)
    return targets.weights().numpy()


def test_the_draws_are_many_and_weigh_to_another_temperature(
    cached: Callable[[str], Path],
) -> None:
    reader = CacheReader(cached("sampled"))
    codec = codec_from(reader.manifest.settings["codec"])
    assert isinstance(codec, SampledCodec)
    rows = codec.expand(reader.sample(0))
    assert (rows["sampled_counts"].sum(1) == 9).all()
    tensors = {name: torch.from_numpy(np.array(one)) for name, one in rows.items()}
    at_draws, at_one = (weights_at(codec, tensors, t) for t in (1.5, 1.0))
    np.testing.assert_allclose(at_draws.sum(1), 1, atol=1e-6)
    assert not np.allclose(at_one.sum(1), 1, atol=1e-3)
    other = reader.sample(1)
    assert rows["sampled_ids"].tolist() != codec.expand(other)["sampled_ids"].tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_and_manifest(name: str, cached: Callable[[str], Path], texts: Path) -> None:
    cache = cached(name)
    assert verify(cache).problems == ()
    manifest = CacheReader(cache).manifest
    settings = manifest.settings
    assert settings["task"] == "lm" and settings["support"]["kind"] == "teacher"
    assert settings["codec"]["name"] == SETTINGS[name].get("codec", "topk")
    assert settings["support"]["size"] == settings["codec"]["support_size"] == 50_257
    assert settings["packing"]["document_end"] == "eos"
    assert ("draw_seed" in settings) == (name in ("sampled", "distinct"))
    summary = manifest.splits["labeled"]
    assert (summary.num_documents, summary.report["num_empty"]) == (6, 1)
    assert summary.num_truncated == 0
    first, second = manifest.about["probe"]["reconstruction"]
    assert 0 <= first["kl"] < 1e-4 and second["kl"] < 1e-4
    assert (first["temperature"], second["temperature"]) == (1.0, 2.0)
    assert (first["lost_mass"] == 0) == (name in ("hidden", "dense"))
    columns = [CacheReader(cache).sample(idx) for idx in range(summary.num_samples)]
    per_token = bytes_per_position(manifest.schema, first["num_ids"])
    names = [spec.name for spec in manifest.schema if spec.is_ragged]
    found = sum(sample[one].nbytes for sample in columns for one in names) / summary.num_tokens
    assert found == pytest.approx(per_token, rel=0.02)
    assert ("language_model_head.safetensors" in manifest.teacher_files) == (name == "hidden")


@pytest.mark.parametrize("name", ["nucleus", "sampled", "distinct", "hidden"])
def test_a_lost_shard_is_made_again_bit_for_bit(
    name: str, tmp_path: Path, cached: Callable[[str], Path], teacher: Path, texts: Path
) -> None:
    config = config_of(tmp_path / "cache", teacher, texts, name)
    cache = cache_teacher.run(config).cache
    before = contents(cache)
    assert before == contents(cached(name))  # another run, another folder
    (cache / "labeled/000/000001.arrow").unlink()
    result = cache_teacher.run(config)
    assert (result.num_shards_run, result.num_shards_kept) == (1, 1)
    assert contents(cache) == before


def test_draws_that_an_earlier_release_began_are_gone_on_with(
    tmp_path: Path, teacher: Path, texts: Path
) -> None:
    """`--codec sampled` alone meant 50 draws with replacement."""
    plain = {"num_draws": None, "draw_temperature": None}
    begun = config_of(tmp_path / "cache", teacher, texts, "sampled", **plain | {"num_draws": 50})
    cache = cache_teacher.run(begun).cache
    before = contents(cache)
    (cache / "labeled/000/000001.arrow").unlink()
    again = config_of(tmp_path / "cache", teacher, texts, "sampled", **plain)
    result = cache_teacher.run(again)
    assert (result.num_shards_run, result.num_shards_kept) == (1, 1)
    assert contents(cache) == before
    new = config_of(tmp_path / "new", teacher, texts, "sampled", **plain)
    assert cache_teacher.run(new).manifest.settings["codec"]["version"] == 2


def test_other_settings_are_not_mixed(
    cached: Callable[[str], Path], teacher: Path, texts: Path
) -> None:
    for changes, saying in (
        ({"top_k": 5}, r"codec\.top_k is 20 there and 5 in"),
        ({"max_length": 16}, r"max_length is 32 there and 16 in"),
        ({"codec": "dense", "top_k": None}, r"codec\.name is 'topk' there and 'dense' in"),
    ):
        with pytest.raises(UserError, match=saying):
            cache_teacher.run(config_of(cached("topk"), teacher, texts, "topk", **changes))


def test_text_of_nothing_is_refused(tmp_path: Path, teacher: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(UserError, match=r"the first 2 documents of .* are all empty"):
        cache_teacher.run(config_of(tmp_path / "cache", teacher, file, "topk"))


def test_a_classifier_is_no_language_model(tmp_path: Path, tiny_bert: Path, texts: Path) -> None:
    with pytest.raises(UserError, match=r"no trained weights|looks at later tokens"):
        cache_teacher.run(config_of(tmp_path / "cache", tiny_bert, texts, "topk"))
