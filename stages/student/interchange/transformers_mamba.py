"""Weights to and from transformers' own Mamba and Mamba-2 classes."""

from __future__ import annotations

import copy
import math
from typing import Any, cast, overload

from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    PreTrainedModel,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.device import recurrences_by_device
from teacher_cache.stages.student.backbone import MambaStudentModel
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.interchange.weights import (
    Model,
    filled,
    refuse_other_values,
    refuse_students,
)
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM

# The student's name of each field, and transformers'.
FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "expand": "expand",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "norm_epsilon": "layer_norm_epsilon",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "use_cache": "use_cache",
    "tie_word_embeddings": "tie_word_embeddings",
}
FIELDS_OF = {
    "mamba": {"dt_rank": "time_step_rank"},
    "mamba2": {"head_dim": "head_dim", "ngroups": "n_groups", "chunk_size": "chunk_size"},
}
# The values of transformers' fields that a student can have.
ONLY: dict[str, tuple[Any, ...]] = {
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "hidden_act": ("silu", "swish"),
    "residual_in_fp32": (True,),
}
ONLY_MAMBA2: dict[str, tuple[Any, ...]] = {
    "time_step_limit": ((0.0, math.inf),),
}

# Exact types: a class derived from one of these may compute something else.
ARCHITECTURES: dict[type[PreTrainedModel], str] = {
    MambaModel: "mamba",
    MambaForCausalLM: "mamba",
    Mamba2Model: "mamba2",
    Mamba2ForCausalLM: "mamba2",
}
CONFIGS = {"mamba": MambaConfig, "mamba2": Mamba2Config}
BACKBONES = {"mamba": MambaModel, "mamba2": Mamba2Model}
LANGUAGE_MODELS = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}


@overload
def from_transformers(model: MambaModel | Mamba2Model) -> MambaStudentModel: ...
@overload
def from_transformers(model: MambaForCausalLM | Mamba2ForCausalLM) -> MambaStudentForCausalLM: ...
def from_transformers(
    model: MambaModel | Mamba2Model | MambaForCausalLM | Mamba2ForCausalLM,
) -> MambaStudentModel | MambaStudentForCausalLM:
    """A student with the weights of one of transformers' Mamba models.

    Args:
        model: with or without its language model head; its weights are copied, each in its dtype.

    Returns:
        A student that computes the same; without a head, the backbone.

    Raises:
        UserError: if the model is of another class, or has what the student has not.
    """
    arch = ARCHITECTURES.get(type(model))
    if arch is None:
        raise UserError(
            f"A student cannot hold the weights of a {type(model).__name__}: give one of "
            f"{', '.join(known.__name__ for known in ARCHITECTURES)}."
        )
    source = f"This {type(model).__name__}"
    fields = vars(model.config)
    refuse_other_values(fields, ONLY, source=source)
    if arch == "mamba2":
        limit = tuple(fields["time_step_limit"])
        refuse_other_values(fields | {"time_step_limit": limit}, ONLY_MAMBA2, source=source)
    names = FIELDS | FIELDS_OF[arch]
    config = MambaStudentConfig(arch=arch, **{ours: fields[name] for ours, name in names.items()})
    is_backbone = isinstance(model, MambaModel | Mamba2Model)
    return _moved(
        model,
        MambaStudentModel if is_backbone else MambaStudentForCausalLM,
        config,
        rename=("embeddings.", "embedding."),
        source=source,
    )


def to_transformers(
    student: MambaStudentModel | MambaStudentForCausalLM,
) -> MambaModel | Mamba2Model | MambaForCausalLM | Mamba2ForCausalLM:
    """One of transformers' Mamba models with a student's weights.

    Args:
        student: a language model or a backbone; its weights are copied, each in its dtype.

    Returns:
        The model of transformers that computes the same, with or without a head as the student.

    Raises:
        UserError: for a bidirectional student or a classifier.
    """
    if not isinstance(student, MambaStudentModel | MambaStudentForCausalLM):
        raise UserError(
            f"transformers has no counterpart of a {type(student).__name__}: give its backbone."
        )
    config = cast(MambaStudentConfig, student.config)
    refuse_students(config, target="transformers")
    arch = config.arch
    names = FIELDS | FIELDS_OF[arch]
    # A student's configuration has bos and eos tokens only where they were given.
    values = {name: getattr(config, ours, None) for ours, name in names.items()}
    if arch == "mamba":
        values["time_step_rank"] = config.resolved_dt_rank
    else:
        values["num_heads"] = config.d_inner // config.head_dim
    classes = BACKBONES if isinstance(student, MambaStudentModel) else LANGUAGE_MODELS
    return _moved(
        student,
        classes[arch],
        CONFIGS[arch](**values),
        rename=("embedding.", "embeddings."),
        source=f"This {type(student).__name__}",
    )


def _moved(
    model: PreTrainedModel,
    target: type[Model],
    config: MambaConfig | Mamba2Config | MambaStudentConfig,
    *,
    rename: tuple[str, str],
    source: str,
) -> Model:
    """A `target` with the weights, mode and generation settings of `model`."""
    tensors = {name.replace(*rename): tensor for name, tensor in model.state_dict().items()}
    moved = filled(target, config, tensors, source=source)
    if model.can_generate():
        moved.generation_config = copy.deepcopy(model.generation_config)
    return recurrences_by_device(moved.train(model.training))
