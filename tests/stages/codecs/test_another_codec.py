"""A codec of somebody else's goes through both stages: nothing but what stands here knows it.

It is all that adding one takes: how it lies on disk, its room, and one call that registers both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.codecs.arrays import Array, cast, namespace
from teacher_cache.cache.codecs.interface import EVERY_CODECS_FIELDS, Decoded, Reduced, Stored
from teacher_cache.cache.codecs.named import CODECS
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import TOP1_LOG_PROB, FieldSpec, Schema, bytes_per_position
from teacher_cache.stages import convert, train_student
from teacher_cache.stages.cache_teacher import estimate
from teacher_cache.stages.codecs import reductions
from teacher_cache.stages.codecs.config import ConvertConfig
from teacher_cache.stages.codecs.interface import Positions, Room, Unused
from teacher_cache.stages.codecs.named import REGISTERED, register, serves
from teacher_cache.stages.codecs.reductions import Chunk, in_chunks, on_host
from teacher_cache.stages.tokens.support import Support
from teacher_cache.stages.verify import verify_deep
from tests.tiny_models import write_tiny_language_model
from tests.tiny_runs import cache_language, language_config, result_log, student_config

NAME = "first"
FIRST_IDS = "first_ids"


@dataclass(frozen=True, kw_only=True)
class ReducedFirst(Reduced):
    """The first ids, [N] int64."""

    ids: np.ndarray


@dataclass(frozen=True, kw_only=True)
class FirstCodec:
    """The most probable id and, as every codec has it, its log-prob."""

    support_size: int

    @property
    def name(self) -> str:
        return NAME

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "support_size": self.support_size}

    @property
    def fields(self) -> Schema:
        return (FieldSpec(name=FIRST_IDS, dtype="uint32", shape=("S",)), *EVERY_CODECS_FIELDS)

    def bytes_per_token(self, entries: float | None = None) -> float:
        return bytes_per_position(self.fields)

    def encode(self, reduced: ReducedFirst) -> dict[str, np.ndarray]:
        return {FIRST_IDS: reduced.ids.astype(np.uint32), **reduced.stored()}

    def expand(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {spec.name: stored[spec.name] for spec in self.fields}

    def decode(self, stored: Stored, temperature: float) -> Decoded:
        log_probs: Array = cast(stored[TOP1_LOG_PROB], "float32")[..., None]
        xp = namespace(log_probs)
        return Decoded(
            ids=cast(stored[FIRST_IDS], "int64")[..., None],
            log_probs=log_probs,
            tail_log_prob=xp.log1p(-xp.exp(log_probs))[..., 0],
            temperature=temperature,
        )


class FirstRoom(Room[FirstCodec]):
    """At temperature 1 alone."""

    lacks = "it holds the first id alone"

    def made(
        self, given: Mapping[str, Any], *, support_size: int, width: int, has_unmatched: bool
    ) -> FirstCodec:
        return FirstCodec(support_size=support_size)

    def reduce(
        self, codec: FirstCodec, support: Support, positions: Positions
    ) -> tuple[ReducedFirst, Unused]:
        def of_chunk(chunk: Chunk) -> ReducedFirst:
            return ReducedFirst(ids=on_host(chunk.below_max.argmax(dim=1)), **chunk.always())

        return in_chunks(of_chunk, support, positions, reductions.CHUNK_ELEMENTS)

    def grid(self, codec: FirstCodec) -> tuple[float, ...]:
        return (1.0,)

    def require_temperature(self, codec: FirstCodec, temperature: float) -> None:
        if temperature != 1:
            raise UserError(f"temperature {temperature:g} is none of a first cache: give 1")


@pytest.fixture(autouse=True, scope="module")
def known() -> Iterator[None]:
    register(NAME, FirstCodec, FirstRoom())
    yield
    del CODECS[NAME], REGISTERED[NAME]


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, gpt2_tokenizer: PreTrainedTokenizerBase
) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("tiny-lm"), gpt2_tokenizer)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, acl_imdb: Path) -> Path:
    folder = tmp_path_factory.mktemp("caches") / NAME
    return cache_language(folder, teacher, acl_imdb, codec=NAME, top_k=None)


def test_the_cache_holds_what_the_teacher_said(cache: Path) -> None:
    manifest = read_manifest(cache)
    assert manifest.complete and manifest.settings["codec"]["name"] == NAME
    assert verify_deep(cache, 2) < 1e-3
    (error,) = manifest.about["probe"]["reconstruction"]
    assert (error["temperature"], error["num_ids"]) == (1.0, 1.0) and error["kl"] < 1e-3
    assert CacheReader(cache).sample(0)[FIRST_IDS].dtype == np.uint32


def test_what_it_takes_is_estimated(teacher: Path, acl_imdb: Path) -> None:
    config = language_config(None, teacher, acl_imdb, codec=NAME, top_k=None)
    token, segment, counts = 4, 2, 1
    assert estimate(config).bytes_per_token == token + segment + counts + 4 + 4
    with pytest.raises(UserError, match="--top-k is of --codec topk, and this run has --codec fir"):
        cache_language(Path("none"), teacher, acl_imdb, codec=NAME)


def test_a_student_trains_on_it(cache: Path, tmp_path: Path) -> None:
    config = student_config(cache, tmp_path / "run", max_steps=2, temperature=1.0)
    run = train_student.run(config).run
    losses = [line["kd"] for line in result_log(run) if "kd" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_it_is_refused_what_it_cannot_serve(cache: Path, tmp_path: Path) -> None:
    assert not serves(FirstCodec(support_size=9), 2.0)
    with pytest.raises(UserError, match="temperature 2 is none of a first cache"):
        train_student.run(student_config(cache, tmp_path / "run", temperature=2.0))
    with pytest.raises(UserError, match="it holds the first id alone; run pipe cache-teacher"):
        convert.run(ConvertConfig.of(cache=cache, out=tmp_path / "topk", codec="topk"))
