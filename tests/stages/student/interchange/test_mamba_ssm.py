"""Folders of mamba_ssm: read and written bit for bit, or refused by the field that does not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student import MambaStudentForCausalLM
from teacher_cache.stages.student.interchange import load_mamba_ssm, save_mamba_ssm
from tests.tiny_students import small_config

TABLE: dict[str, Any] = json.loads(
    Path(__file__).with_name("mamba_ssm_parameters.json").read_text()
)
LANGUAGE_MODELS = [entry for entry in TABLE["modules"] if entry["kind"] == "MambaLMHeadModel"]
BOTH = pytest.mark.parametrize("arch", ["mamba", "mamba2"])


def written_by_mamba_ssm(folder: Path, config: dict[str, Any], shapes: dict[str, Any]) -> Any:
    """A folder as `MambaLMHeadModel.save_pretrained` leaves it; returns its weights."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if config.get("tie_embeddings", True):
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    return tensors


def student(**changes: Any) -> MambaStudentForCausalLM:
    torch.manual_seed(0)
    model = MambaStudentForCausalLM(small_config(**changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def assert_same_bits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("entry", LANGUAGE_MODELS, ids=lambda entry: str(entry["settings"]))
def test_reads_what_mamba_ssm_writes_and_writes_it_again(entry, tmp_path: Path) -> None:
    """Names and shapes are those of mamba_ssm's own model, padded vocabulary included."""
    theirs, again = tmp_path / "theirs", tmp_path / "again"
    theirs.mkdir()
    settings = entry["settings"]
    tensors = written_by_mamba_ssm(theirs, settings, entry["parameters"])
    model = load_mamba_ssm(theirs)
    assert not model.training
    assert_same_bits(tensors, dict(model.state_dict()))
    tied = settings.get("tie_embeddings", True)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == tied
    multiple = settings.get("pad_vocab_size_multiple", 8)
    assert model.config.vocab_size == {1: 50, 8: 56, 16: 64}[multiple]
    save_mamba_ssm(model, again)
    assert_same_bits(tensors, torch.load(again / "pytorch_model.bin", weights_only=True))
    assert_same_bits(tensors, dict(load_mamba_ssm(again).state_dict()))


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_comes_back_bit_for_bit(arch, tied, tmp_path: Path) -> None:
    model = student(arch=arch, tie_word_embeddings=tied, chunk_size=8, ngroups=2, d_conv=3)
    save_mamba_ssm(model, tmp_path / "new" / "folder")
    back = load_mamba_ssm(tmp_path / "new" / "folder")
    assert_same_bits(dict(model.state_dict()), dict(back.state_dict()))
    ids = torch.randint(0, 50, (2, 9))
    assert torch.equal(back(ids).logits, model(ids).logits)
    before, after = model.config.to_dict(), back.config.to_dict()
    differing = {name for name in before if after[name] != before[name]}
    assert differing <= {"dt_rank", "dtype", "chunk_size", "head_dim", "ngroups"}
    assert back.config.resolved_dt_rank == model.config.resolved_dt_rank
    if arch == "mamba2":
        assert (back.config.chunk_size, back.config.head_dim, back.config.ngroups) == (8, 12, 2)


@BOTH
def test_the_configuration_is_mamba_ssms(arch, tmp_path: Path) -> None:
    save_mamba_ssm(student(arch=arch, tie_word_embeddings=False), tmp_path)
    sizes = {"d_conv": 4, "d_state": 4, "expand": 3}
    sizes |= {"dt_max": 0.1, "dt_min": 0.001, "dt_init_floor": 1e-4}
    ssm_cfg = {
        "mamba": {"layer": "Mamba1", "dt_rank": 1, **sizes},
        "mamba2": {
            **{"layer": "Mamba2", "headdim": 12, "ngroups": 1, "chunk_size": 64},
            **{"A_init_range": [1.0, 16.0], **sizes},
        },
    }
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "d_model": 16,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 50,
        "ssm_cfg": ssm_cfg[arch],
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
    }


def test_keeps_each_weights_dtype_and_mark(tmp_path: Path) -> None:
    model = student(arch="mamba").bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "D")):  # as mamba_ssm keeps them
            parameter.data = parameter.data.float()
    save_mamba_ssm(model, tmp_path)
    back = load_mamba_ssm(tmp_path)
    assert_same_bits(dict(model.state_dict()), dict(back.state_dict()))


MIXERS = {"Mamba1": {}, "Mamba2": {"headdim": 16, "layer": "Mamba2"}}


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        ("Mamba1", {"d_intermediate": 64}, "has d_intermediate 64, where a student can only"),
        ("Mamba1", {"attn_layer_idx": [1]}, r"has attn_layer_idx \[1\]"),
        ("Mamba1", {"rms_norm": False}, "has rms_norm False"),
        ("Mamba1", {"residual_in_fp32": False}, "has residual_in_fp32 False"),
        ("Mamba1", {"tie_embedding": True}, "'tie_embedding', which mamba_ssm has not: did you"),
        ("Mamba1", {"vocab_size": "50"}, "has vocab_size '50': give a whole number above 0"),
        ("Mamba1", {"pad_vocab_size_multiple": 0}, "has pad_vocab_size_multiple 0"),
        ("Mamba1", {"d_model": "wide"}, "d_model is 'wide'"),
        ("Mamba1", {"dt_min": "small"}, "is not of mamba_ssm's form"),
        ("Mamba1", {"dt_rank": "three"}, "ssm_cfg, has dt_rank 'three': give a whole number"),
        ("Mamba1", {"n_layer": 0}, "num_layers is 0"),
        ("Mamba1", {"ssm_cfg": [1]}, "it and its ssm_cfg map names"),
        ("Mamba1", {"layer": "Mamba3"}, "layer 'Mamba3', which a student has not"),
        ("Mamba1", {"headdim": 16}, "ssm_cfg, has a field 'headdim', which mamba_ssm has not"),
        ("Mamba1", {"bias": True}, "ssm_cfg, has bias True"),
        ("Mamba1", {"conv_bias": False}, "has conv_bias False"),
        ("Mamba1", {"expand": 1.5}, "expand is 1.5"),
        ("Mamba2", {"bias": True}, "has bias True"),
        ("Mamba2", {"conv_bias": False}, "has conv_bias False"),
        ("Mamba2", {"D_has_hdim": True}, "has D_has_hdim True"),
        ("Mamba2", {"rmsnorm": False}, "has rmsnorm False"),
        ("Mamba2", {"norm_before_gate": True}, "has norm_before_gate True"),
        ("Mamba2", {"dt_limit": [0.0, 0.1]}, "has dt_limit"),
        ("Mamba2", {"d_ssm": 32}, "has d_ssm 32, where a student can only have None or 96"),
        ("Mamba2", {"headdim": 7}, "head_dim 7 does not divide"),
    ],
)
def test_refuses_what_a_student_has_not(layer, changes, message, tmp_path: Path) -> None:
    of_model = {"d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg"}
    of_model |= {"attn_layer_idx", "rms_norm", "residual_in_fp32", "tie_embedding"}
    config: dict[str, Any] = {"d_model": 48, "n_layer": 2, "vocab_size": 50}
    config["ssm_cfg"] = dict(MIXERS[layer])
    for field, value in changes.items():
        of_model_itself = field in of_model | {"pad_vocab_size_multiple"}
        (config if of_model_itself else config["ssm_cfg"])[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_mamba_ssm(tmp_path)


@pytest.mark.parametrize(
    "harmless",
    [
        {"fused_add_norm": False, "attn_cfg": {"num_heads": 4}},
        {"ssm_cfg": {"layer": "Mamba1", "dt_init": "constant", "dt_scale": 2.0}},
        {"ssm_cfg": {"layer": "Mamba1", "use_fast_path": False, "dt_rank": 3}},
        {"ssm_cfg": {"layer": "Mamba1", "bias": False, "conv_bias": True}},
    ],
)
def test_what_changes_speed_or_initial_weights_alone_is_read_over(harmless, tmp_path: Path) -> None:
    shapes = dict(LANGUAGE_MODELS[0]["parameters"])
    if "dt_rank" in harmless.get("ssm_cfg", {}):
        for layer in range(2):  # dt_rank is as ceil(48 / 16) already: the shapes stay
            assert shapes[f"backbone.layers.{layer}.mixer.dt_proj.weight"] == [96, 3]
    config = LANGUAGE_MODELS[0]["settings"] | harmless
    tensors = written_by_mamba_ssm(tmp_path, config, shapes)
    assert_same_bits(tensors, dict(load_mamba_ssm(tmp_path).state_dict()))


def test_refuses_an_epsilon_that_mamba_ssm_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="norms add 1e-05, this student's norm_epsilon is 1e-06"):
        save_mamba_ssm(student(norm_epsilon=1e-6), tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_weights_that_do_not_fit(tmp_path: Path) -> None:
    settings, shapes = LANGUAGE_MODELS[0]["settings"], LANGUAGE_MODELS[0]["parameters"]
    tensors = written_by_mamba_ssm(tmp_path, settings, shapes)
    weights = tmp_path / "pytorch_model.bin"
    torch.save({name: tensors[name] for name in tensors if "norm_f" not in name}, weights)
    with pytest.raises(
        UserError, match=r"pytorch_model.bin lacks backbone.norm_f.weight: weights and"
    ):
        load_mamba_ssm(tmp_path)
    torch.save(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, weights)
    with pytest.raises(UserError, match=r"lm_head.weight is tied to .* but the two differ"):
        load_mamba_ssm(tmp_path)
    torch.save({"step": 3}, weights)
    with pytest.raises(UserError, match="holds more than names and tensors"):
        load_mamba_ssm(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not weights", pickle.dumps(nn.Linear(1, 1), protocol=2)])
def test_runs_no_code_and_reads_no_rubbish(data: bytes, tmp_path: Path) -> None:
    settings, shapes = LANGUAGE_MODELS[0]["settings"], LANGUAGE_MODELS[0]["parameters"]
    written_by_mamba_ssm(tmp_path, settings, shapes)
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(UserError, match="holds no tensors that can be read safely"):
        load_mamba_ssm(tmp_path)
    torch.save(nn.Linear(1, 1), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no tensors that can be read safely"):
        load_mamba_ssm(tmp_path)


def test_names_the_file_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing: give a folder that mamba_ssm"):
        load_mamba_ssm(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 48, "n_layer": 1}')
    with pytest.raises(UserError, match=r"pytorch_model.bin is missing"):
        load_mamba_ssm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is no JSON"):
        load_mamba_ssm(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not of mamba_ssm's form"):
        load_mamba_ssm(tmp_path)


def test_a_killed_save_leaves_no_configuration_of_other_weights(
    tmp_path: Path, monkeypatch
) -> None:
    save_mamba_ssm(student(arch="mamba"), tmp_path)

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    module = "teacher_cache.stages.student.interchange.mamba_ssm"
    monkeypatch.setattr(f"{module}.write_bytes_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        save_mamba_ssm(student(arch="mamba2"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
