"""Stage one with attention maps and hidden states, from the options to a verified cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    GPT2Config,
    MambaConfig,
    PreTrainedTokenizerBase,
)

from teacher_cache.cache.codecs.attention import attention_from, largest_kl, row_kl
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Ragged, check_fields
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher, train_student
from teacher_cache.stages import cache_teacher as cache_size
from teacher_cache.stages.cache_teacher import CacheTeacherConfig, estimate
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.teacher import layers as layer_tap
from teacher_cache.stages.verify import verify_deep
from tests.small_caches import contents
from tests.tiny_models import tiny_language_model, write_tiny_language_model
from tests.tiny_runs import cache_reviews, result_files, reviews_config, student_config

PROSE = (
    "She was the youngest of the two daughters of a most affectionate father.",
    "A short one.",
    "Her mother had died too long ago for her to have more than an indistinct remembrance of her "
    "caresses; and her place had been supplied by an excellent woman as governess.",
    "It was a fine evening, and they walked on.",
)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    """The tiny cache with every kind of map's fields and states: 120 + 60 reviews."""
    folder = tmp_path_factory.mktemp("caches") / "mapped"
    return cache_reviews(
        folder, tiny_bert, acl_imdb, attention="mean", attention_layers="all", hidden="last,0"
    )


@pytest.fixture(scope="module")
def language_model(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), gpt2_tokenizer)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, language_model: Path) -> Path:
    """A language model's cache with whole maps of both layers and states."""
    folder = tmp_path_factory.mktemp("packed")
    config = language_model_config(folder, language_model)
    return cache_teacher.run(config).cache


def language_model_config(folder: Path, teacher: Path, **changes: Any) -> CacheTeacherConfig:
    (folder / "prose.txt").write_text("\n".join(PROSE))
    settings: dict[str, Any] = {
        "name": "prose",
        "task": "lm",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": 48,
        "top_k": 4,
        "labeled": CorpusConfig(source=str(folder / "prose.txt"), labeled=False),
        "out": folder / "cache",
        "attention": "full",
        "attention_layers": "all",
        "hidden": "last,0",
    }
    return CacheTeacherConfig.of(**(settings | changes))


def test_a_classifiers_maps_and_states(mapped: Path, tiny_cache: Path, tiny_bert: Path) -> None:
    plain, reader = CacheReader(tiny_cache), CacheReader(mapped)
    manifest = reader.manifest
    assert [spec.name for spec in manifest.schema][4:] == [
        *("attention_0", "attention_1", "hidden", "hidden_0"),
    ]
    assert manifest.settings["hidden"] == "last,0"
    assert manifest.settings["attention"] == {
        "encoding": "sqrt-u8",
        "mode": "mean",
        "layers": [0, 1],
        "num_heads": 2,
        "is_causal": False,
        "is_packed": False,
        "pooled_at": None,
        "implementation": "eager",
    }
    assert {"attention", "hidden"}.isdisjoint(plain.manifest.settings)
    assert reader.sidecars[0].environment["attention"] == "eager"
    assert plain.sidecars[0].environment["attention"] == "sdpa"
    codec: Any = attention_from(manifest.settings)
    model = BertForSequenceClassification.from_pretrained(tiny_bert, attn_implementation="eager")
    for sample_idx in (0, 57, 119):
        sample = reader.sample(sample_idx)
        given = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        with torch.no_grad():
            said: Any = model.eval()(given, output_attentions=True, output_hidden_states=True)
        for layer in (0, 1):
            exact = said.attentions[layer][0].numpy().mean(0)
            found = codec.decode(sample[f"attention_{layer}"], len(given[0]))
            assert (row_kl(exact, found) <= largest_kl(exact) + 1e-5).all()
        for name, states in (
            ("hidden", said.hidden_states[2]),
            ("hidden_0", said.hidden_states[1]),
        ):
            np.testing.assert_allclose(sample[name], states[0].numpy(), rtol=2e-3, atol=2e-3)
        # Eager attention rounds otherwise, and says the same.
        logits = plain.sample(sample_idx)["class_logits"]
        np.testing.assert_allclose(sample["class_logits"], logits, rtol=0, atol=1e-4)
    found = manifest.about["attention"]
    assert found["num_rows"] > 1000 and 0 < found["row_kl"] < found["largest_row_kl"] < 1e-3


def test_a_language_models_maps_do_not_cross_documents(packed: Path, language_model: Path) -> None:
    reader = CacheReader(packed)
    codec: Any = attention_from(reader.manifest.settings)
    assert codec.is_causal and codec.is_packed and codec.num_heads == 2
    model: Any = AutoModelForCausalLM.from_pretrained(language_model, attn_implementation="eager")
    most_pieces = 0
    for sample_idx in range(len(reader)):
        sample = reader.sample(sample_idx)
        lengths = np.bincount(sample["segment"])
        most_pieces = max(most_pieces, len(lengths))
        assert len(sample["attention_0"]) == (lengths * (lengths + 1) // 2).sum()
        whole = codec.decode_sample(sample["attention_1"], lengths.tolist())
        same = sample["segment"][:, None] == sample["segment"][None]
        assert ((whole > 0) == (same & np.tril(np.ones_like(same)))).all()
        for piece in range(len(lengths)):
            inside = sample["segment"] == piece
            ids = torch.from_numpy(sample["input_ids"][inside].astype(np.int64))[None]
            with torch.no_grad():
                exact = model(ids, output_attentions=True).attentions[1][0].numpy()
            found = whole[:, inside][:, :, inside]
            assert (row_kl(exact, found) <= largest_kl(exact) + 1e-5).all()
    assert most_pieces > 1


def test_pooled_states_stand_beside_them(
    tmp_path: Path, tiny_bert: Path, acl_imdb: Path, pooled_cache: Path
) -> None:
    labeled = CorpusConfig(source=str(acl_imdb), split="train", max_samples=10)
    asked: dict[str, Any] = {"hidden": "0,pooled", "attention": "cls", "unlabeled": None}
    cache = cache_reviews(tmp_path / "c", tiny_bert, acl_imdb, labeled=labeled, **asked)
    reader, other = CacheReader(cache), CacheReader(pooled_cache)
    assert reader.manifest.settings["hidden"] == "pooled,0"
    assert [spec.name for spec in reader.manifest.schema][4:] == [
        *("pooled", "attention_1", "hidden_0"),
    ]
    (same,) = other.find(reader.sample(0)["sample_id"].tobytes().hex())
    np.testing.assert_allclose(reader.sample(0)["pooled"], other.sample(same)["pooled"], atol=2e-3)


def test_verified_deeply(mapped: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(mapped).problems == () and verify(packed).problems == ()
    assert verify_deep(mapped, 4) < 1e-4
    assert verify_deep(packed, 4) < 1e-2
    tell = layer_tap.LayerTap._tell
    for wrong, sentence in (
        ("attention", r"attention maps are up to \S+ nats further .* at most 0\.001"),
        ("hidden", r"hidden states are up to \S+ of their length .* at most 0\.002"),
    ):

        def altered(self: Any, name: str, one: Any, values: Any, wrong: str = wrong) -> None:
            ramp = torch.arange(1.0, values.shape[-1] + 1)
            tell(self, name, one, values * ramp if name.startswith(wrong) else values)

        for cache in (mapped, packed):
            with monkeypatch.context() as patch, pytest.raises(CheckFailed, match=sentence):
                patch.setattr(layer_tap.LayerTap, "_tell", altered)
                verify_deep(cache, 2)


def test_other_maps_or_states_are_not_mixed(mapped: Path, tiny_bert: Path, acl_imdb: Path) -> None:
    asked: dict[str, Any] = {"attention": "mean", "attention_layers": "all", "hidden": "last,0"}
    for changes, sentence in (
        ({"attention": "cls"}, r"attention\.mode is 'mean' there and 'cls' in"),
        ({"attention_layers": "last"}, r"attention\.layers is \[0, 1\] there and \[1\] in"),
        ({"hidden": "last"}, "hidden is 'last,0' there and 'last' in"),
        ({"attention": "none", "attention_layers": None}, r"attention\S* is .* there and None in"),
    ):
        config = reviews_config(mapped, tiny_bert, acl_imdb, **(asked | changes))
        with pytest.raises(UserError, match=sentence):
            cache_teacher.run(config)


def test_a_grown_cache_is_the_one_made_at_once(tmp_path: Path, language_model: Path) -> None:
    folders = [tmp_path / name for name in ("grown", "whole")]
    for folder in folders:
        folder.mkdir()
    source = str(folders[0] / "prose.txt")

    def run(folder: Path, num: int) -> int:
        config = language_model_config(folder, language_model, shard_documents=1)
        labeled = CorpusConfig(source=source, labeled=False, max_samples=num)
        return cache_teacher.run(config.model_copy(update={"labeled": labeled})).num_shards_run

    assert (run(folders[0], 2), run(folders[0], 4), run(folders[0], 4)) == (2, 2, 0)
    assert run(folders[1], 4) == 4
    assert contents(folders[0] / "cache") == contents(folders[1] / "cache")


def test_a_student_that_asks_for_no_maps_trains_as_if_there_were_none(
    mapped: Path, tmp_path: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    """Bit for bit, from logits that are the same: those of eager attention round otherwise."""
    plain = cache_reviews(
        tmp_path / "plain", tiny_bert, acl_imdb, attention="cls", attention_layers="0"
    )
    files = []
    for name, cache in (("mapped", mapped), ("plain", plain)):
        run = tmp_path / name / "run"
        train_student.run(student_config(cache, run))
        files.append({
            one: data for one, data in result_files(run).items() if one.endswith(".safetensors")
        })  # fmt: skip
    assert files[0] and files[0] == files[1]


def test_no_room_on_the_disk(
    tmp_path: Path, tiny_bert: Path, acl_imdb: Path, mapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_size, "free_bytes", lambda cache: 50_000)
    config = reviews_config(tmp_path / "c", tiny_bert, acl_imdb, attention="full")
    with pytest.raises(UserError, match=r"take about 0\.\d MB and the disk of .* has 0\.1 MB free"):
        cache_teacher.run(config)
    assert not list(tmp_path.rglob("*.arrow"))
    # What is there already needs no room; what is removed gives some.
    monkeypatch.setattr(cache_size, "free_bytes", lambda cache: 0)
    cache_size.require_room(mapped, 1e6, num_shards=2, overwrite=False)
    taken = sum(path.stat().st_size for path in mapped.glob("*/*/*"))
    cache_size.require_room(mapped, taken, num_shards=2, overwrite=True)
    with pytest.raises(UserError, match=r"about 0\.5 MB and the disk"):
        cache_size.require_room(mapped, 1e6, num_shards=4, overwrite=False)
    with pytest.raises(UserError, match=r"about \d+\.\d MB and the disk"):
        cache_size.require_room(mapped, taken + 1e6, num_shards=2, overwrite=True)


def test_what_is_free_is_the_disks(tmp_path: Path) -> None:
    assert cache_size.free_bytes(tmp_path / "new" / "one") > 0


def test_the_estimate_is_what_the_shards_take(
    mapped: Path, packed: Path, tiny_bert: Path, acl_imdb: Path, language_model: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    configs = {
        mapped: reviews_config(
            mapped, tiny_bert, acl_imdb, attention="mean", attention_layers="all", hidden="last,0"
        ),
        packed: language_model_config(packed.parent, language_model),
    }
    for cache, config in configs.items():
        found = estimate(config)
        splits = CacheReader(cache).manifest.splits.values()
        assert found.num_bytes is not None and found.num_layer_bytes is not None
        # Arrow's own frames come on top: they are a quarter of the smaller cache.
        taken = sum(one.num_bytes for one in splits)
        assert 0.85 * taken - 6000 < found.num_bytes < 1.05 * taken
        kept = [CacheReader(cache, split) for split in CacheReader(cache).manifest.splits]
        layers = sum(
            reader.sample(idx)[spec.name].nbytes
            for reader in kept
            for idx in range(len(reader))
            for spec in reader.manifest.schema
            if spec.name.startswith(("attention_", "hidden"))
        )
        assert found.num_layer_bytes == pytest.approx(layers, rel=0.1)
        assert found.maps == CacheReader(cache).manifest.about["attention"]
    with caplog.at_level(logging.INFO, logger="teacher_cache"):
        again = configs[packed].model_copy(update={"out": packed.parent / "again"})
        cache_teacher.run(again)
    assert "MB to write" in caplog.text


def test_larger_maps_make_smaller_shards(tmp_path: Path, tiny_bert: Path, acl_imdb: Path) -> None:
    labeled = CorpusConfig(source=str(acl_imdb), split="train", max_samples=10)
    asked: dict[str, Any] = {"labeled": labeled, "unlabeled": None, "shard_mb": 1}
    asked |= {"attention": "full", "attention_layers": "all", "hidden": "last"}
    cache = cache_reviews(tmp_path / "c", tiny_bert, acl_imdb, **asked)
    reader = CacheReader(cache)
    per_sample = np.mean([
        sum(field.nbytes for field in reader.sample(idx).values()) + 5 * 4
        for idx in range(len(reader))
    ])  # fmt: skip
    assert reader.manifest.layout["documents_per_shard"] == int(1e6 / per_sample) < 1024


def test_a_teacher_without_attention_is_refused(
    tmp_path: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = MambaConfig(vocab_size=len(gpt2_tokenizer), hidden_size=16, num_hidden_layers=1)
    model: Any = tiny_language_model(config)
    model.save_pretrained(tmp_path / "mamba")
    gpt2_tokenizer.save_pretrained(tmp_path / "mamba")
    asked = language_model_config(tmp_path, tmp_path / "mamba", hidden="none")
    with pytest.raises(UserError, match=r"MambaForCausalLM\) gives no attention maps: leave"):
        cache_teacher.run(asked)


def test_fields_of_another_length_are_not_written(packed: Path) -> None:
    reader = CacheReader(packed)
    fields = reader.samples(range(len(reader)))
    assert check_fields(reader.manifest.schema, fields) == len(reader)
    map_field: Any = fields["attention_0"]
    cut = Ragged(
        values=map_field.values[:-1],
        offsets=np.append(map_field.offsets[:-1], map_field.offsets[-1] - 1),
    )
    with pytest.raises(UserError, match=r"'attention_0' of sample \d+ has length \d+; its shape"):
        check_fields(reader.manifest.schema, fields | {"attention_0": cut})


def test_a_tiny_causal_classifier_is_read_at_its_last_position(
    tmp_path: Path, tiny_gpt2: Path, acl_imdb: Path
) -> None:
    labeled = CorpusConfig(
        source=str(acl_imdb), split="train", max_samples=10, label_names=("neg", "pos")
    )
    asked: dict[str, Any] = {"labeled": labeled, "unlabeled": None, "attention": "cls"}
    reader = CacheReader(cache_reviews(tmp_path / "c", tiny_gpt2, acl_imdb, **asked))
    assert reader.manifest.settings["attention"]["pooled_at"] == "last"
    assert GPT2Config.from_pretrained(tiny_gpt2).n_layer == 2
    for idx in range(len(reader)):
        sample = reader.sample(idx)
        assert len(sample["attention_1"]) == len(sample["input_ids"])
