"""Caches of conversations: what is stored, where, and what of it a student learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.cache.codecs.interface import has_rows, rows_of
from teacher_cache.cache.codecs.named import codec_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import MANIFEST_NAME
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import COUNTED
from teacher_cache.stages import cache_teacher, convert
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.data.packing import next_ids
from teacher_cache.stages.training.batches import PackedCollator, PackedSamples
from teacher_cache.stages.training.views import TokensView
from teacher_cache.stages.verify import verify_deep
from tests.chat_templates import MARKED, SPECIAL
from tests.small_caches import contents
from tests.tiny_models import write_tiny_language_model
from tests.tiny_tokenizers import tiny_byte_level

CODECS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 20},
    "nucleus": {"codec": "topk", "top_p": 0.02, "temperatures": (1.0, 2.0)},
    "sampled": {"codec": "sampled", "num_draws": 9},
    "hidden": {"codec": "hidden"},
    "dense": {"codec": "dense"},
}
MAX_LENGTH = 192


TOKENIZER = tiny_byte_level(SPECIAL)
TOKENIZER.chat_template = MARKED


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), TOKENIZER)


def turn(asked: str, answered: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered},
    ]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations of one and of two turns, prompts longer than answers."""
    rows = [
        turn(f"what is between {number} and {number + 2}", f"{number + 1}")
        + (turn("and then", "the next of them") if number % 3 == 0 else [])
        for number in range(8)
    ]
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": one}) for one in rows))
    return file


def config_of(out: Path, teacher: Path, data: Path, **changes: Any) -> CacheTeacherConfig:
    values: dict[str, Any] = {
        "task": "lm",
        "name": "chats",
        "teacher": str(teacher),
        "device": "cpu",
        "max_length": MAX_LENGTH,
        "shard_documents": 3,
        "labeled": CorpusConfig(source=str(data), labeled=False, conversations=True),
        "end_of_turn": ("<|done|>",),
        "loss_on": "assistant",
        "out": out,
    }
    return CacheTeacherConfig.of(**(values | changes))


Cached = Callable[..., Path]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, teacher: Path, chats: Path) -> Cached:
    made: dict[str, Path] = {}

    def cache_of(codec: str, **changes: Any) -> Path:
        key = json.dumps([codec, changes])
        if key not in made:
            out = tmp_path_factory.mktemp("caches") / codec
            config = config_of(out, teacher, chats, **CODECS[codec], **changes)
            made[key] = cache_teacher.run(config).cache
        return made[key]

    return cache_of


def samples(cache: Path) -> list[dict[str, np.ndarray]]:
    reader = CacheReader(cache)
    return [reader.sample(idx) for idx in range(len(reader))]


@pytest.mark.parametrize("store", ["arrow", "zarr"])
@pytest.mark.parametrize("codec", CODECS)
def test_only_counted_positions_are_stored_and_they_are_those_of_the_whole(
    codec: str, store: str, cached: Cached
) -> None:
    """Bit for bit what a cache of everything says there, of both formats."""
    answers, whole = cached(codec, format=store), cached(codec, loss_on="all")
    reader = CacheReader(answers)
    kept = codec_from(reader.manifest.settings["codec"])
    by_id = {one["sample_id"].tobytes(): one for one in samples(whole)}
    assert len(by_id) == len(reader)
    for sample in samples(answers):
        theirs = by_id[sample["sample_id"].tobytes()]
        assert np.array_equal(sample["input_ids"], theirs["input_ids"])
        assert np.array_equal(has_rows(sample), sample["loss_mask"])
        assert has_rows(theirs).all()
        assert (sample["loss_mask"] <= theirs["loss_mask"]).all()
        for name, rows in rows_of(kept, sample).items():
            counts = sample["loss_mask"]
            other = rows_of(kept, theirs)[name][counts]
            width = [slice(0, size) for size in rows[counts].shape]
            assert np.array_equal(rows[counts], other[tuple(width)]), name
            assert not rows[~counts].any()
    schema = {spec.name: spec.shape for spec in reader.manifest.schema}
    assert schema["next_log_prob"] == (COUNTED,) and schema["input_ids"] == ("S",)


def test_answers_and_their_ends_count_and_nothing_else(cached: Cached) -> None:
    answers = set()
    for sample in samples(cached("topk")):
        following = np.append(next_ids(sample["input_ids"], sample["segment"])[:-1], 0)
        counts = sample["loss_mask"]
        ids = sample["input_ids"]
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(counts)) + 1)
        answers |= {str(TOKENIZER.decode(following[run])) for run in runs if counts[run[0]]}
    assert answers == {f"{number}<|done|>" for number in range(1, 9)} | {"the next of them<|done|>"}


def test_a_conversation_is_never_cut_and_shares_its_sample(cached: Cached) -> None:
    for sample in samples(cached("topk")):
        borders = np.flatnonzero(np.diff(sample["segment"])) + 1
        assert len(sample["input_ids"]) <= MAX_LENGTH
        for piece in np.split(sample["input_ids"], borders):
            text = str(TOKENIZER.decode(piece))
            assert text.startswith("<|turn|>user\nwhat is between") and text.endswith("<|done|>\n")


def test_the_bytes_are_those_of_the_answers(tmp_path: Path, teacher: Path) -> None:
    """Where prompts are four fifths of the tokens, at most 0.3 of a cache of everything."""
    rows = [
        turn(f"number {number} " + "tell me of it " * 5, "so it is, and it is so too")
        for number in range(24)
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(json.dumps({"messages": one}) for one in rows))
    sizes = {}
    for loss_on in ("all", "assistant"):
        out = tmp_path / loss_on
        config = config_of(out, teacher, data, loss_on=loss_on, max_length=256, shard_documents=24)
        manifest = cache_teacher.run(config).manifest
        summary = manifest.splits["labeled"]
        sizes[loss_on] = summary.num_bytes
        found = summary.report["conversations"]
        assert found["num_conversations"] == found["num_answers"] == 24
    assert found["num_learned"] / found["num_tokens"] == pytest.approx(0.18, abs=0.03)
    assert sizes["assistant"] <= 0.3 * sizes["all"]


def test_noise_in_the_place_of_prompts_changes_no_target(cached: Cached) -> None:
    cache = cached("topk")
    reader = CacheReader(cache)
    codec = codec_from(reader.manifest.settings["codec"])
    plain = PackedSamples(reader, np.arange(len(reader)), labeled=True)
    rng = np.random.RandomState(0)

    def noisy(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        is_answer = np.append(False, sample["loss_mask"][:-1])
        noise = rng.randint(0, 256, len(is_answer))
        ids = np.where(is_answer, sample["input_ids"], noise).astype(np.uint32)
        assert (ids != sample["input_ids"]).sum() > len(ids) / 2
        return sample | {"input_ids": ids, "next_ids": next_ids(ids, sample["segment"])}

    view, collate = TokensView(codec, None, None), PackedCollator(0, codec)  # pyright: ignore[reportArgumentType]
    for idx in range(len(reader)):
        batches = [collate([one]) for one in (plain[idx], noisy(plain[idx]))]
        states = torch.zeros(*batches[0]["input_ids"].shape, 1)
        outputs = type("Outputs", (), {"final_states": states})()
        one, other = (view.positions(outputs, batch) for batch in batches)
        assert one.stored.keys() == other.stored.keys()
        for name, field in one.stored.items():
            assert torch.equal(field, other.stored[name]), name
        assert one.next_ids is not None and other.next_ids is not None
        assert torch.equal(one.next_ids, other.next_ids) and (one.next_ids >= 0).all()


@pytest.mark.parametrize("codec", ["topk", "sampled", "hidden"])
def test_the_teacher_says_again_what_is_stored(codec: str, cached: Cached) -> None:
    verify_deep(cached(codec), 2)


def test_a_conversion_is_what_capture_makes(tmp_path: Path, cached: Cached) -> None:
    from_dense = convert.run(
        ConvertConfig.of(cache=cached("dense"), out=tmp_path / "topk", codec="topk", top_k=20)
    ).cache
    for ours, theirs in zip(samples(from_dense), samples(cached("topk")), strict=True):
        assert np.array_equal(ours["next_log_prob"], theirs["next_log_prob"])
        assert (ours["topk_ids"] == theirs["topk_ids"]).mean() > 0.8  # but for ties of float16
        assert ours["topk_ids"].shape == theirs["topk_ids"].shape
    drawn = convert.run(
        ConvertConfig.of(cache=cached("dense"), out=tmp_path / "drawn", codec="sampled")
    ).manifest
    assert drawn.about["probe"]["measured_against"] == "dense"
    as_zarr = convert.run(
        ConvertConfig.of(cache=cached("topk"), out=tmp_path / "zarr", format="zarr")
    ).cache
    for ours, theirs in zip(samples(as_zarr), samples(cached("topk")), strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_gone_on_with_leaves_the_same_bytes(
    tmp_path: Path, teacher: Path, chats: Path, cached: Cached
) -> None:
    config = config_of(tmp_path / "again", teacher, chats, **CODECS["topk"])
    cache_teacher.run(config)
    shards = sorted((tmp_path / "again").rglob("*.arrow"))
    lost = next(one for one in shards if "labeled/" in str(one))
    before = contents(tmp_path / "again")
    lost.unlink()
    lost.with_suffix(".json").unlink()
    result = cache_teacher.run(config)
    assert result.num_shards_run == 1
    after = contents(tmp_path / "again")
    assert {name for name in before if before[name] != after[name]} <= {MANIFEST_NAME}


def test_settings_and_format_say_what_was_read(cached: Cached) -> None:
    manifest = CacheReader(cached("topk")).manifest
    found = manifest.settings["data"]["labeled"]["conversations"]
    assert found["columns"] == ["messages"] and found["loss_on"] == "assistant"
    assert {"<|endoftext|>", "<|done|>"} <= {*found["ends"]} and "date" not in found
    assert len(found["template_sha256"]) == 64
    written = json.loads((cached("topk") / MANIFEST_NAME).read_text())
    assert written["format_version"] == 3
    whole = json.loads((cached("topk", loss_on="all") / MANIFEST_NAME).read_text())
    assert whole["format_version"] == 1
    assert manifest.fingerprint != whole["fingerprint"]


@pytest.mark.parametrize(
    ("row", "changes", "saying"),
    [
        ({"messages": [{"role": "usr", "content": "a"}]}, {}, "role 'usr' .did you mean 'user'"),
        ({"messages": [{"content": "a"}]}, {}, "role None"),
        ({"messages": turn("a", "")}, {}, "all its answers are empty"),
        ({"messages": turn("a", "b")[:1]}, {}, "has no answer"),
        ({"messages": []}, {}, "has no message"),
        ({"messages": [*turn("a", "b"), turn("c", "d")[0]]}, {"loss_on": "completion"}, "not end"),
        (
            {"messages": turn("a" * 240, "b")},
            {},
            "prompt that is longer than a sample of 192.*raise",
        ),
        ({"messages": turn("a", "b" * 240)}, {}, "it is longer than a sample of 192 tokens"),
        ({"messages": turn("a <|done|>", "b")}, {}, "spells the control token"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, turn("a", "b")[1]]},
            {},
            r"part that is no text \(image_url\)",
        ),
        ({"prompt": "a", "completion": " "}, {}, "all its answers are empty"),
    ],
)
def test_what_cannot_be_used_is_refused_or_left_out(
    row: dict[str, Any], changes: dict[str, Any], saying: str, tmp_path: Path, teacher: Path
) -> None:
    good: dict[str, Any] = {"messages": turn("x", "y")}
    if "prompt" in row:
        good = {"prompt": "x", "completion": "y"}
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps(good) + "\n" + json.dumps(row))
    config = config_of(tmp_path / "cache", teacher, data, **changes)
    with pytest.raises(UserError, match=f"1 of 2 conversations .* number 2: .*{saying}"):
        cache_teacher.run(config)
    dropping = config_of(
        tmp_path / "cache", teacher, data, **changes, unusable_conversations="drop"
    )
    report = cache_teacher.run(dropping).manifest.splits["labeled"].report
    assert sum(report["conversations"]["unusable"].values()) == 1
    assert report["num_documents"] == 1


def test_a_dropped_system_text_is_refused_unless_allowed(tmp_path: Path, teacher: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(MARKED.replace("messages %}", "messages if m.role != 'system' %}"))
    data = tmp_path / "chats.jsonl"
    data.write_text(
        json.dumps({"messages": [{"role": "system", "content": "be so"}, *turn("a", "b")]})
    )
    changes = {"chat_template": template}
    with pytest.raises(UserError, match=r"leaves out its text of kind system.*may-drop system"):
        cache_teacher.run(config_of(tmp_path / "cache", teacher, data, **changes))
    allowed = config_of(tmp_path / "cache", teacher, data, **changes, template_may_drop=("system",))
    found = cache_teacher.run(allowed).manifest.splits["labeled"].report["conversations"]
    assert found["dropped"] == {"system": 1}


def test_columns_of_other_names_and_shapes(tmp_path: Path, teacher: Path) -> None:
    """The same conversation, as four tools write it, is the same sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = turn("what", "that")
    sharegpt = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "that"}]
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": messages, "other": 1},
        "sharegpt": {"conversations": sharegpt},
        "texts": {"prompt": "what", "completion": "that"},
        "lists": {"prompt": messages[:1], "completion": messages[1:]},
        "parts": {
            "messages": [
                {**messages[0], "content": [{"type": "text", "text": "what"}]},
                messages[1],
            ]
        },
    }
    found = {}
    for name, row in rows.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps(row))
        found[name] = samples(cache_teacher.run(config_of(tmp_path / name, teacher, data)).cache)
    table = tmp_path / "table.parquet"
    both = [messages, [{**messages[0], "name": "me"}, messages[1]]]
    pq.write_table(pa.table({"messages": both}), table)
    found["parquet"] = samples(cache_teacher.run(config_of(tmp_path / "p", teacher, table)).cache)
    first = found["messages"][0]
    for name, its in found.items():
        size = len(first["input_ids"])
        assert np.array_equal(its[0]["input_ids"][:size], first["input_ids"]), name
        assert np.array_equal(its[0]["loss_mask"][:size], first["loss_mask"]), name


def test_a_column_of_texts_that_is_asked_for_stays_one(tmp_path: Path, teacher: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"conversation": "some text of some length"}))
    labeled = CorpusConfig(
        source=str(data), labeled=False, conversations=True, text_column="conversation"
    )
    config = config_of(
        tmp_path / "cache", teacher, data, labeled=labeled, loss_on="all", end_of_turn=()
    )
    assert "conversations" not in cache_teacher.run(config).manifest.settings["data"]["labeled"]


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"chat_template_kwargs": "{"}, "--chat-template-kwargs { is no JSON"),
        ({"chat_template_kwargs": "[]"}, "is no object"),
        ({"chat_date": "today"}, "--chat-date today is no date"),
        ({"chat_template": Path("none.jinja")}, "--chat-template none.jinja cannot be read"),
    ],
)
def test_options_that_cannot_be(
    changes: dict[str, Any], saying: str, tmp_path: Path, teacher: Path, chats: Path
) -> None:
    with pytest.raises(UserError, match=saying):
        cache_teacher.run(config_of(tmp_path / "cache", teacher, chats, **changes))


def test_options_of_conversations_beside_texts(tmp_path: Path, teacher: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "some text of some length"}))
    with pytest.raises(UserError, match=r"--loss-on is of conversations, and .* texts of 'text'"):
        cache_teacher.run(config_of(tmp_path / "cache", teacher, data, end_of_turn=()))
