"""Language models to and from the folders of mamba_ssm's `MambaLMHeadModel`.

Such a folder holds `config.json`, the fields of `mamba_ssm/models/config_mamba.py`, and
`pytorch_model.bin`, whose names are the student's own. Read and written without mamba_ssm.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from teacher_cache.cache.commit import explained, write_bytes_atomically, write_json_atomically
from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.interchange.weights import (
    filled,
    refuse_other_values,
    refuse_students,
)
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "pytorch_model.bin"
NORM_EPSILON = 1e-5  # of every norm: MambaLMHeadModel passes on no other

# Values where config.json does not say, as in mamba_ssm.
MODEL_DEFAULTS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
COMMON_DEFAULTS: dict[str, Any] = {
    "d_conv": 4,
    "expand": 2,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init_floor": 1e-4,
    "bias": False,
    "conv_bias": True,
}
MIXER_DEFAULTS: dict[str, dict[str, Any]] = {
    "Mamba1": COMMON_DEFAULTS
    | {
        "d_state": 16,
        "dt_rank": "auto",
        "dt_init": "random",
        "dt_scale": 1.0,
        "use_fast_path": True,
    },
    "Mamba2": COMMON_DEFAULTS
    | {
        "d_state": 128,
        "conv_init": None,
        "headdim": 64,
        "d_ssm": None,
        "ngroups": 1,
        "A_init_range": (1, 16),
        "D_has_hdim": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "dt_limit": (0.0, math.inf),
        "chunk_size": 256,
        "use_mem_eff_path": True,
        "sequence_parallel": True,
    },
}

# The values that a student can have. What is named above and neither here nor in FIELDS changes
# initial weights or speed alone.
MODEL_ONLY: dict[str, tuple[Any, ...]] = {
    "d_intermediate": (0,),
    "attn_layer_idx": ([],),
    "rms_norm": (True,),
    "residual_in_fp32": (True,),
}
MIXER_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "Mamba1": {"bias": (False,), "conv_bias": (True,)},
    "Mamba2": {
        "bias": (False,),
        "conv_bias": (True,),
        "D_has_hdim": (False,),
        "rmsnorm": (True,),
        "norm_before_gate": (False,),
        "dt_limit": ((0.0, math.inf), [0.0, math.inf]),
    },
}

# The student's name of each field, and mamba_ssm's.
COMMON_FIELDS = {name: name for name in ("d_state", "d_conv", "expand", "dt_min", "dt_max")} | {
    "dt_init_floor": "dt_init_floor"
}
FIELDS = {
    "Mamba1": COMMON_FIELDS | {"dt_rank": "dt_rank"},
    "Mamba2": COMMON_FIELDS
    | {
        "head_dim": "headdim",
        "ngroups": "ngroups",
        "A_init_range": "A_init_range",
        "chunk_size": "chunk_size",
    },
}
ARCHITECTURES = {"Mamba1": "mamba", "Mamba2": "mamba2"}


def load_mamba_ssm(folder: Path) -> MambaStudentForCausalLM:
    """A student with the weights of a folder that mamba_ssm wrote.

    Args:
        folder: holds `config.json` and `pytorch_model.bin`.

    Returns:
        A language model in evaluation mode, each weight in the file's dtype; its vocabulary is
        mamba_ssm's, padded to a multiple of `pad_vocab_size_multiple`.

    Raises:
        UserError: if a file is missing or unreadable, the two do not fit, or the model has what
            the student has not.
    """
    config = student_config(_read_config(folder / CONFIG_NAME), source=str(folder / CONFIG_NAME))
    weights = folder / WEIGHTS_NAME
    return filled(
        MambaStudentForCausalLM, config, _read_weights(weights), source=str(weights)
    ).eval()


def save_mamba_ssm(student: MambaStudentForCausalLM, folder: Path) -> None:
    """Write a folder that mamba_ssm's `MambaLMHeadModel.from_pretrained` reads.

    Args:
        student: its vocabulary is written as it is, without padding.
        folder: created where missing; its two files are replaced, `config.json` last.

    Raises:
        UserError: if the student has what mamba_ssm has not, or the file system refuses.
    """
    config = mamba_ssm_config(cast(MambaStudentConfig, student.config))
    data = io.BytesIO()
    torch.save(student.state_dict(), data)
    with explained(folder):
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # never another model's beside the weights
    write_bytes_atomically(folder / WEIGHTS_NAME, data.getvalue())
    write_json_atomically(folder / CONFIG_NAME, config)


def student_config(given: Mapping[str, Any], *, source: str) -> MambaStudentConfig:
    """The student's configuration for what mamba_ssm's says.

    Args:
        given: fields of mamba_ssm's `MambaConfig`; its defaults hold for the others.
        source: whose fields these are, as a sentence begins.

    Raises:
        UserError: naming the field that is unknown, or that the student has not.
    """
    model = _with_defaults(given, MODEL_DEFAULTS, source=source)
    refuse_other_values(model, MODEL_ONLY, source=source)
    mixer = dict(model["ssm_cfg"] or {})
    layer = mixer.pop("layer", "Mamba1")
    if layer not in ARCHITECTURES:
        raise UserError(
            f"{source} has ssm_cfg layer {layer!r}, which a student has not: it can only be "
            f"{' or '.join(ARCHITECTURES)}."
        )
    mixer_source = f"{source}, ssm_cfg,"
    mixer = _with_defaults(mixer, MIXER_DEFAULTS[layer], source=mixer_source)
    refuse_other_values(mixer, MIXER_ONLY[layer], source=mixer_source)
    sizes = {ours: mixer[name] for ours, name in FIELDS[layer].items()}
    if sizes.get("dt_rank") == "auto":
        sizes["dt_rank"] = None
    elif layer == "Mamba1":
        _require_whole_number(mixer, "dt_rank", source=mixer_source)
    try:
        config = MambaStudentConfig(
            arch=ARCHITECTURES[layer],
            vocab_size=_padded_vocabulary(model, source=source),
            d_model=model["d_model"],
            num_layers=model["n_layer"],
            norm_epsilon=NORM_EPSILON,
            tie_word_embeddings=model["tie_embeddings"],
            **sizes,
        )
    except StrictDataclassError as error:
        raise UserError(f"{source} is not of mamba_ssm's form: {error}") from error
    if layer == "Mamba2":
        refuse_other_values(mixer, {"d_ssm": (None, config.d_inner)}, source=mixer_source)
    return config


def mamba_ssm_config(config: MambaStudentConfig) -> dict[str, Any]:
    """Fields of mamba_ssm's `MambaConfig` for a student's configuration.

    Raises:
        UserError: if mamba_ssm has no such model.
    """
    refuse_students(config, target="mamba_ssm")
    if config.norm_epsilon != NORM_EPSILON:
        raise UserError(
            f"mamba_ssm's norms add {NORM_EPSILON}, this student's norm_epsilon is "
            f"{config.norm_epsilon}, so it cannot be moved there."
        )
    layer = {arch: layer for layer, arch in ARCHITECTURES.items()}[config.arch]
    mixer = {name: getattr(config, ours) for ours, name in FIELDS[layer].items()}
    if layer == "Mamba1":
        mixer["dt_rank"] = config.resolved_dt_rank
    return MODEL_DEFAULTS | {
        "d_model": config.d_model,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer, **mixer},
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }


def _with_defaults(
    given: Mapping[str, Any], defaults: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    for field in given:
        if field not in defaults:
            raise UserError(
                f"{source} has a field {field!r}, which mamba_ssm has not: "
                f"{did_you_mean(field, defaults)}"
            )
    return {**defaults, **given}


def _padded_vocabulary(model: Mapping[str, Any], *, source: str) -> int:
    for field in ("vocab_size", "pad_vocab_size_multiple"):
        _require_whole_number(model, field, source=source)
    multiple = model["pad_vocab_size_multiple"]
    return -(-model["vocab_size"] // multiple) * multiple


def _require_whole_number(values: Mapping[str, Any], field: str, *, source: str) -> None:
    if not isinstance(values[field], int) or values[field] < 1:
        raise UserError(f"{source} has {field} {values[field]!r}: give a whole number above 0.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a folder that mamba_ssm wrote.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch the folder again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("ssm_cfg") or {}, dict):
        raise UserError(f"{path} is not of mamba_ssm's form: it and its ssm_cfg map names.")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a folder that mamba_ssm wrote.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} holds no tensors that can be read safely ({type(error).__name__}): fetch it "
            "again from where you trust."
        ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} holds more than names and tensors: save a state_dict alone.")
    return tensors
