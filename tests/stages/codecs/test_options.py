from __future__ import annotations

from typing import Any

import pytest

from teacher_cache.cache.codecs.named import CODECS, codec_from
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.cache_teacher import CacheTeacherConfig
from teacher_cache.stages.codecs.config import CodecConfig
from teacher_cache.stages.codecs.named import codec_of, given_attributes, room_of
from teacher_cache.stages.config import owners
from teacher_cache.stages.data.corpus import CorpusConfig
from teacher_cache.stages.teacher.options import check_options


def config_of(**given: Any) -> CacheTeacherConfig:
    labeled = CorpusConfig(source="d")
    return CacheTeacherConfig.of(teacher="t", name="n", labeled=labeled, **given)


@pytest.mark.parametrize(
    ("given", "saying"),
    [
        ({"top_k": 5}, "--top-k is of language models.* give --task lm"),
        ({"codec": "dense"}, "--codec is of language models"),
        ({"exact": False}, "--exact is of language models"),
        ({"task": "lm", "hidden": "pooled"}, "--hidden pooled is of classifiers"),
        ({"task": "lm", "views": 2}, "--views 2 is of classifiers"),
        ({"task": "lm", "num_draws": 5}, "--num-draws is of --codec sampled, .* has --codec topk"),
        (
            {"task": "lm", "codec": "dense", "temperatures": "1,2"},
            "--temperatures is of --codec topk or sampled, .* has --codec dense",
        ),
        ({"task": "lm", "codec": "sampled", "top_p": 0.5}, "--top-p is of --codec topk"),
    ],
)
def test_options_that_belong_elsewhere_are_refused(given: dict[str, Any], saying: str) -> None:
    with pytest.raises(UserError, match=saying):
        check_options(config_of(**given))


def test_every_option_belongs_to_a_codec() -> None:
    belongs_to = owners(CodecConfig)
    assert belongs_to.keys() == CodecConfig.model_fields.keys()
    for option, owner in belongs_to.items():
        assert owner.task == "lm" and owner.sets.keys() <= CODECS.keys()
        assert bool(owner.sets) == (option != "codec")


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {"name": "topk", "top_k": 64, "is_exact": False, "top_p": None}),
        (
            {"top_k": 5, "exact": True, "top_p": 0.9, "temperatures": "1, 3"},
            {"top_k": 5, "is_exact": True, "top_p": 0.9, "temperatures": [1.0, 3.0]},
        ),
        ({"codec": "sampled"}, {"version": 2, "num_ids": 32, "draw_temperature": 1.0}),
        ({"codec": "sampled", "num_ids": 20}, {"version": 2, "num_ids": 20}),
        (
            {"codec": "sampled", "num_draws": 7, "draw_temperature": 2},
            {"name": "sampled", "num_draws": 7, "draw_temperature": 2.0},
        ),
        ({"codec": "hidden"}, {"name": "hidden", "width": 8}),
        ({"codec": "dense"}, {"name": "dense", "support_size": 100}),
    ],
)
def test_the_codec_is_what_the_options_say(given: dict[str, Any], settings: dict[str, Any]) -> None:
    config = config_of(task="lm", **given)
    check_options(config)
    found = codec_of(config.kept, support_size=100, width=8).settings
    assert settings.items() <= found.items()


def test_draws_are_of_one_kind() -> None:
    config = config_of(task="lm", codec="sampled", num_draws=9, num_ids=9)
    with pytest.raises(UserError, match="--num-ids distinct ids: give one of both"):
        codec_of(config.kept, support_size=100, width=8)


@pytest.mark.parametrize(
    ("given", "former"),
    [
        (
            {"codec": "sampled", "temperatures": "1,3"},
            {"num_draws": 50, "temperatures": [1.0, 3.0]},
        ),
        ({"codec": "sampled", "num_ids": 32}, None),
        ({"codec": "sampled", "num_draws": 9}, None),
        ({}, None),
    ],
)
def test_what_the_same_options_were_before(given: dict[str, Any], former: Any) -> None:
    """A cache that an earlier release began is gone on with, unless the new kind is asked for."""
    config = config_of(task="lm", **given)
    codec = codec_of(config.kept, support_size=100, width=8)
    found = room_of(codec).former(codec, given_attributes(config.kept, codec.name))
    if former is None:
        assert found is None
    else:
        assert found is not None and former.items() <= found.settings.items()
        assert found == codec_from(found.settings)


def test_a_value_that_cannot_be_is_a_sentence() -> None:
    with pytest.raises(UserError, match="--top-k 200 cannot be: the teacher uses 100 ids"):
        codec_of(config_of(task="lm", top_k=200).kept, support_size=100, width=8)
