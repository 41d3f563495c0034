"""What every exchange of weights shares: which values fit, and every parameter moved, none left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.config import MambaStudentConfig

Model = TypeVar("Model", bound=PreTrainedModel)


def refuse_other_values(
    found: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], *, source: str
) -> None:
    """Refuse a model that computes what the student cannot.

    Args:
        found: field to value.
        only: field to the values that the student can have.
        source: whose fields these are, as a sentence begins.

    Raises:
        UserError: naming the first field with another value.
    """
    for field, values in only.items():
        if found[field] not in values:
            raise UserError(
                f"{source} has {field} {found[field]!r}, where a student can only have "
                f"{' or '.join(repr(value) for value in values)}: its weights cannot be moved."
            )


def refuse_students(config: MambaStudentConfig, *, target: str) -> None:
    """Refuse to move a student that `target` has no place for.

    Raises:
        UserError: for both directions, and for what no Mamba has.
    """
    if config.beyond_mamba:
        raise UserError(
            f"{target} has no place for what this student has beyond Mamba's own layers "
            f"({', '.join(config.beyond_mamba)}): move one without."
        )
    if config.bidirectional:
        raise UserError(
            f"{target} has no bidirectional mixers, so this student cannot be moved there: train "
            "one without bidirectional."
        )


def filled(
    model_class: type[Model],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
) -> Model:
    """A model with these weights, copied; each keeps its dtype and device.

    Args:
        model_class: of the model.
        config: of the model.
        tensors: every parameter by its name in `model_class`, a tied one under each of its names.
        source: where they come from, as a sentence begins.

    Returns:
        The model, in training mode.

    Raises:
        UserError: if a name is missing or unknown, a shape differs, or tied ones differ.
    """
    with init.no_init_weights():
        model = model_class(config)
    model.tie_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _refuse_names(parameters, tensors, source=source)
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{source} holds {name} of shape {list(tensor.shape)}, but its sizes call for "
                f"{list(parameter.shape)}: weights and configuration are not of the same model."
            )
        first_name = first_names.setdefault(parameter, name)
        if not torch.equal(tensor, tensors[first_name]):
            raise UserError(
                f"{source} says that {name} is tied to {first_name}, but the two differ: weights "
                "and configuration are not of the same model."
            )
        if first_name == name:  # into the parameter itself, which keeps its marks
            parameter.data = tensor.detach().clone()
    return model


def _refuse_names(wanted: Iterable[str], found: Iterable[str], *, source: str) -> None:
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    faults = [
        f"{what} {', '.join(names[:3])}{' and others' if names[3:] else ''}"
        for what, names in (("lacks", missing), ("has no place for", unknown))
        if names
    ]
    if faults:
        raise UserError(
            f"{source} {' and '.join(faults)}: weights and configuration are not of the same model."
        )
