"""What the student's configuration refuses, and that it survives its file."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import MambaStudentConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "mamba3"}, "arch 'mamba3': did you mean 'mamba'"),
        ({"pooling": "man"}, "pooling 'man': did you mean 'mean'"),
        ({"head": "lineal"}, "head 'lineal': did you mean 'linear'"),
        ({"head_dim": 100}, "head_dim 100 does not divide .* = 768: choose 96"),
        ({"ngroups": 3}, "8 heads do not divide into 3 groups"),
        ({"d_conv": 1}, "d_conv is 1"),
        ({"dt_rank": 0}, "dt_rank is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"d_model": "wide"}, "d_model is 'wide'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max"),
        ({"A_init_range": [0.0, 16.0]}, "A_init_range"),
        ({"position_map": {"mode": "apend"}}, "did you mean 'append'"),
        ({"position_map": {"mode": "append", "token_id": 30522}}, "appends token 30522"),
    ],
)
def test_refuses_with_one_sentence(settings, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        MambaStudentConfig(**settings)
    assert "\n" not in str(caught.value)


def test_transformers_names_are_aliases() -> None:
    theirs: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2}
    config = MambaStudentConfig(**theirs, head_dim=48)
    assert (config.d_model, config.num_layers) == (128, 2)
    config = MambaStudentConfig(d_model=192)
    assert (config.hidden_size, config.num_hidden_layers) == (192, 4)


def test_survives_its_file(tmp_path) -> None:
    config = MambaStudentConfig(
        d_model=128,
        head_dim=48,
        id2label={0: "rotten", 1: "fresh", 2: "neither"},
        label2id={"rotten": 0, "fresh": 1, "neither": 2},
        position_map={"mode": "append", "token_id": 7},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MambaStudentConfig)
    assert loaded.num_labels == 3
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_mamba_ssms_kernels_take_the_default_sizes() -> None:
    config = MambaStudentConfig()
    inner = config.expand * config.d_model
    heads = inner // config.head_dim
    assert (2 * inner + 2 * config.ngroups * config.d_state + heads) % 8 == 0
