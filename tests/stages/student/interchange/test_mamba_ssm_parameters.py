"""Names and shapes of every parameter against the table that mamba_ssm's own modules gave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from teacher_cache.stages.student import (
    MambaStudentConfig,
    MambaStudentForCausalLM,
    MambaStudentModel,
)
from teacher_cache.stages.student.interchange.mamba_ssm import student_config
from teacher_cache.stages.student.mixers import Mamba, Mamba2

# Written by scripts/mamba-ssm-parameters.
TABLE: dict[str, Any] = json.loads(
    Path(__file__).with_name("mamba_ssm_parameters.json").read_text()
)

MIXERS: dict[str, Any] = {"Mamba": Mamba, "Mamba2": Mamba2}
MODELS: dict[str, Any] = {
    "MixerModel": MambaStudentModel,
    "MambaLMHeadModel": MambaStudentForCausalLM,
}
# mamba_ssm's defaults, which the table's settings leave out.
DEFAULTS: dict[str, Any] = {"expand": 2, "d_conv": 4}
DEFAULTS_OF: dict[str, Any] = {"Mamba": {"d_state": 16}, "Mamba2": {"d_state": 128, "headdim": 64}}


def mixer(kind: str, settings: dict[str, Any]) -> nn.Module:
    values = DEFAULTS | DEFAULTS_OF[kind] | settings
    if "headdim" in values:
        values["head_dim"] = values.pop("headdim")
    config = MambaStudentConfig(arch=kind.lower(), vocab_size=1, num_layers=1, **values)
    return MIXERS[kind](config)


def model(kind: str, settings: dict[str, Any]) -> nn.Module:
    if kind == "MixerModel":  # pads no vocabulary
        settings = settings | {"pad_vocab_size_multiple": 1}
    return MODELS[kind](student_config(settings, source="the table"))


def test_the_table_is_of_the_version_that_the_mixers_follow() -> None:
    assert TABLE["mamba_ssm"] == "2.3.2.post1"
    kinds = [entry["kind"] for entry in TABLE["modules"]]
    assert set(kinds) == {*MIXERS, *MODELS}


@pytest.mark.parametrize(
    "entry", TABLE["modules"], ids=lambda entry: f"{entry['kind']}-{entry['settings']}"
)
def test_names_and_shapes_are_mamba_ssms(entry: dict[str, Any]) -> None:
    build = mixer if entry["kind"] in MIXERS else model
    with torch.device("meta"):
        ours = build(entry["kind"], entry["settings"])
    found = {name: list(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert found == entry["parameters"]


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
def test_projections_convolution_and_embedding_start_as_mamba_ssms(arch: str) -> None:
    """Torch's own start values there, and a normal one for the embedding; dt, A, D: the mixers'."""
    torch.manual_seed(0)
    student = MambaStudentForCausalLM(MambaStudentConfig(arch=arch, vocab_size=512, num_layers=1))
    start = dict(student.named_parameters())
    assert abs(start["backbone.embedding.weight"].std() - 0.02) < 0.0003
    prefix = "backbone.layers.0.mixer."
    bounds = {"in_proj.weight": 256, "conv1d.weight": 4, "conv1d.bias": 4, "out_proj.weight": 768}
    if arch == "mamba":
        bounds |= {"x_proj.weight": 768, "dt_proj.weight": 16}
    for name, fan_in in bounds.items():
        values, bound = start[prefix + name], 1 / math.sqrt(fan_in)
        assert 0.98 * bound < values.abs().max() <= bound * (1 + 1e-6), name
        assert abs(values.std() / bound - 1 / math.sqrt(3)) < 0.03, name  # uniform
