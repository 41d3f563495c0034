"""Any of transformers' models as it is loaded, hashed and measured; teacher or student."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.tokens.tokenizers import (
    could_not_load,
    is_local_only,
    require_folder,
)

DEFAULT_MAX_LENGTH = 512


EAGER = "eager"
"""transformers' name of the attention that forms its maps; others never do."""


def longest_sample(
    name: str, model: PreTrainedModel, tokenizer: Tokenizer, requested: int | None
) -> int:
    """The longest sample in tokens: as requested, else what the model reads, at most 512.

    Raises:
        UserError: if more was requested than the model can read.
    """
    positions = num_positions(model)
    limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if requested is None:
        return min(limit, DEFAULT_MAX_LENGTH)
    if requested > limit:
        raise UserError(
            f"--max-length {requested} is more than {name} reads ({limit} tokens): give at most "
            f"{limit}"
        )
    return requested


def num_positions(model: PreTrainedModel) -> int | None:
    """The longest sample that the model has positions for; None where nothing bounds it."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and its kin begin behind their padding's own position.
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding_idx = getattr(embeddings, "padding_idx", None)
    return positions - padding_idx - 1 if positions and padding_idx is not None else positions


def on_device(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model on its device, in its number format, in evaluation mode; its head in float32.

    A head in half precision would round the logits (bfloat16 to 3 digits); so what stands behind
    the base model keeps float32, and its input is widened. Where the two share a weight, as a
    language model's head and its embeddings do, the head gets its own copy.
    """
    torch.nn.Module.to(model, device=device, dtype=dtype)  # in place, as for every module
    in_base = {id(module) for module in model.base_model.modules()}
    of_base = {id(parameter) for parameter in model.base_model.parameters()}
    for module in model.modules():
        if id(module) not in in_base and any(True for _ in module.parameters(recurse=False)):
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in of_base and dtype is not torch.float32:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            torch.nn.Module.float(module)
            module.register_forward_pre_hook(_widen)
    return model.eval()


def _widen(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for one in inputs
    )


def described_config(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration, without what says where and by whom it was saved."""
    described = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):
        described.pop(name, None)
    return described


def class_names(model: PreTrainedModel) -> dict[int, str]:
    """Class names by id."""
    return {int(class_id): name for class_id, name in (model.config.id2label or {}).items()}


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 (hex) of the state dict: names, shapes and float32 bytes, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(values.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_model(
    auto_class: Any,
    name: str,
    *,
    what: str,
    content: str,
    trust_remote_code: bool,
    with_attention: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model in float32, on the CPU.

    Args:
        auto_class: of transformers.
        name: hub id or folder.
        what: it is called in a message.
        content: of the folder that is expected, in a message.
        trust_remote_code: run the code that a hub repository brings.
        with_attention: with attention that forms its maps: slower, in more memory, and rounded
            otherwise.

    Returns:
        The model, and the names of its weights that are in no file.

    Raises:
        UserError: if it cannot be found or loaded.
    """
    require_folder(name, content, option="--teacher")
    try:
        model, info = auto_class.from_pretrained(
            name,
            local_files_only=is_local_only(name),
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=EAGER if with_attention else None,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # torch's, safetensors'
        raise UserError(could_not_load(what, name, error, option="--teacher")) from error
    return model, sorted(info["missing_keys"])


def settle_pad_id(name: str, config: PreTrainedConfig, tokenizer: Tokenizer) -> int:
    """The id that fills batches: the model's, else the tokenizer's padding or end-of-text token.

    Decoders pool at the last token that is not the model's padding, so both must be the same; a
    model that names none is told.

    Raises:
        UserError: if neither names one.
    """
    candidates = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    for candidate in candidates:
        if isinstance(candidate, int):
            config.pad_token_id = candidate
            return candidate
    raise UserError(
        f"the tokenizer of {name} has neither a padding nor an end-of-text token, so samples "
        "cannot be batched: set its pad_token"
    )
