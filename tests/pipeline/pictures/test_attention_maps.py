"""Maps and states on the command line: dry run, `pipe inspect`, and the picture of a sample."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.pipeline.pictures import (
    NamedMap,
    Panels,
    new_figure,
    readable_tokens,
    rendered,
    teacher_maps,
)
from tests.command_line import done, refused
from tests.tiny_models import write_tiny_language_model
from tests.tiny_runs import cache_reviews

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "mapped"
    asked: dict[str, Any] = {"attention": "mean", "attention_layers": "all", "hidden": "last"}
    return cache_reviews(folder, tiny_bert, acl_imdb, unlabeled=None, **asked)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prose") / "emma.txt"
    file.write_text("Emma was clever and rich.\nShe paid $5 and $6 for it.\nThe end.\n")
    return file


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase, prose: Path
) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    teacher = write_tiny_language_model(folder / "teacher", gpt2_tokenizer)
    done(
        *("cache-teacher", "--task", "lm", "--data", prose, "--teacher", teacher),
        *("--attention", "full", "--attention-layers", "0", "--out", folder / "cache"),
    )
    return folder / "cache"


def size_of(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def first_id(cache: Path) -> str:
    return CacheReader(cache).sample(0)["sample_id"].tobytes().hex()


def rows(printed: str) -> dict[str, str]:
    """The lines of tables of two columns."""
    cells = [line.split("│")[1:3] for line in printed.splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in cells}


def test_the_dry_run_says_what_maps_will_take(
    tmp_path: Path, tiny_bert: Path, acl_imdb: Path, mapped: Path
) -> None:
    printed = done(
        *("cache-teacher", "--data", acl_imdb, "--teacher", tiny_bert, "--out", tmp_path / "c"),
        *("--attention", "mean", "--hidden", "last", "--max-length", "24", "--dry-run"),
    )
    found = rows(printed)
    assert float(found["MB of maps and states of layers"]) > 0
    assert "nats, at most" in found["KL of an attention row"]
    assert "reconstruction KL" not in printed and "bytes a token" not in printed
    assert not (tmp_path / "c").exists()


def test_inspect_lists_them_field_by_field(mapped: Path) -> None:
    found = rows(done("inspect", mapped))
    sizes = [len(one) for one in _ids(mapped)]
    chosen = np.unique(np.linspace(0, len(sizes) - 1, 64).astype(int))
    mean = np.mean([sizes[idx] ** 2 for idx in chosen])
    assert found["bytes a sample of attention_0"] == f"{mean:,.0f}"
    assert found["bytes a sample of attention_1"] == f"{mean:,.0f}"
    states = np.mean([2 * 32 * sizes[idx] for idx in chosen])
    assert found["bytes a sample of hidden"] == f"{states:,.0f}"
    assert found["bytes a sample in all"] == f"{2 * mean + states:,.0f}"
    assert "nats, at most" in found["KL of an attention row"]


def _ids(cache: Path) -> list[np.ndarray]:
    reader = CacheReader(cache)
    return [reader.sample(idx)["input_ids"] for idx in range(len(reader))]


def test_inspect_of_a_language_model_lists_them_too(packed: Path) -> None:
    found = rows(done("inspect", packed))
    assert "bytes of attention_0" not in found  # it has no size a token
    assert int(found["bytes a sample of attention_0"].replace(",", "")) > 0
    assert "bytes of topk_ids" in found


@pytest.mark.parametrize("name", ["mapped", "packed"])
def test_a_samples_maps_are_drawn(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cache: Path = request.getfixturevalue(name)
    picture = tmp_path / "out.png"
    assert "drawn" in done(
        "inspect", cache, "--sample", first_id(cache), "--attention-image", picture
    )
    width, height = size_of(picture.read_bytes())
    assert width > 500 and height > 400


def test_the_maps_that_are_drawn_are_the_cached_ones(
    packed: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = CacheReader(packed)
    sample = reader.sample(0)
    tokens = readable_tokens(gpt2_tokenizer, sample["input_ids"].tolist())
    (one,) = teacher_maps(reader.manifest, sample, tokens)
    assert one.title == "teacher, layer 0, mean of 2 heads" and list(one.row_labels) == tokens
    codec: Any = attention_from(reader.manifest.settings)
    lengths = np.bincount(sample["segment"]).tolist()
    assert len(lengths) == 3
    heads = codec.decode_sample(sample["attention_0"], lengths)
    seen = ~np.isnan(one.values)
    np.testing.assert_allclose(one.values[seen], heads.mean(0)[seen], rtol=1e-6)
    same = sample["segment"][:, None] == sample["segment"][None]
    assert np.array_equal(seen, same & np.tril(np.ones_like(same)))
    assert "\N{OPEN BOX}clever" in tokens and "\N{OPEN BOX}$" in tokens


def test_rows_of_the_pooled_position_share_a_panel(
    tmp_path: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    asked: dict[str, Any] = {"attention": "cls", "attention_layers": "all", "unlabeled": None}
    reader = CacheReader(cache_reviews(tmp_path / "c", tiny_bert, acl_imdb, **asked))
    sample = reader.sample(0)
    tokens = ["[CLS]", *(f"t{i}" for i in range(len(sample["input_ids"]) - 1))]
    (one,) = teacher_maps(reader.manifest, sample, tokens)
    assert one.values.shape == (2, len(tokens)) and one.row_labels == ["layer 0", "layer 1"]
    assert one.title == "teacher, what [CLS] looks at"
    assert b"<svg" in rendered(Panels(maps=[one], tokens=tokens).figure(), "svg")


def test_maps_of_any_origin_stand_side_by_side() -> None:
    tokens = [f"token{i}" for i in range(90)]
    values = np.tril(np.ones((90, 90)))
    maps = [
        NamedMap(title=title, values=np.where(values > 0, values / (i + 1), np.nan),
                 row_labels=tokens)
        for i, title in enumerate(("teacher", "student", "other", "fourth"))
    ]  # fmt: skip
    drawn = [Panels(maps=part, tokens=tokens).figure() for part in (maps[:1], maps)]
    (one_wide, one_high), (wide, high) = (size_of(rendered(one, "png")) for one in drawn)
    assert wide > 2 * one_wide and high > 1.5 * one_high


def test_verify_says_which_layers_it_compared(mapped: Path) -> None:
    printed = done("verify", mapped, "--deep", "2")
    saying = "; attention_0, attention_1, hidden within what their rounding allows"
    assert "✓ logits as cached: largest difference" in printed
    assert saying in " ".join(printed.split())


def test_what_cannot_be_drawn_is_refused(
    mapped: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "out.png"
    refused("inspect", mapped, "--attention-image", picture, saying="give its id with --sample")
    asked = ("--sample", first_id(mapped), "--attention-image")
    refused(
        *("inspect", mapped, *asked, tmp_path / "out.doc"),
        saying="has the ending 'doc', expected one of",
    )
    refused(
        *("inspect", tiny_cache, "--sample", first_id(tiny_cache), "--attention-image", picture),
        saying="the cache was made without: make one with `pipe cache-teacher --attention mean`",
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'teacher-cache\[report\]'"):
        new_figure(1.0, 1.0)
    assert not picture.exists()
