"""Any of transformers' models as it is loaded, hashed and measured; teacher or student."""

from __future__ import annotations

import hashlib
import inspect
import math
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.hub import cached_file

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.device import (
    missing_libraries,
    recurrences_by_device,
    warn_of_missing_kernels,
)
from teacher_cache.stages.tokens.tokenizers import (
    WEIGHT_FILES,
    could_not_load,
    is_local_only,
    require_folder,
)

DEFAULT_MAX_LENGTH = 512
NO_ID = -1  # of no token
CPU = torch.device("cpu")
LOADING_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What transformers, torch, pickle and safetensors raise of files that are damaged or unknown."""


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
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    positions = next((one for one in named if isinstance(one, int) and one > 0), None)
    # RoBERTa and its kin begin behind their padding's own position.
    embeddings = getattr(base_of(model), "embeddings", None)
    is_table = isinstance(embeddings, torch.nn.Embedding)  # XLM's own, of tokens
    padding_idx = None if is_table else getattr(embeddings, "padding_idx", None)
    return positions - padding_idx - 1 if positions and padding_idx is not None else positions


def require_rows(
    name: str, model: PreTrainedModel, tokenizer: Tokenizer, samples: Sequence[np.ndarray]
) -> None:
    """Refuse a token that the model has no row of its tables for.

    Args:
        name: it is called in a message.
        model: whose embeddings and, of a language model, logits they are.
        tokenizer: that made the samples.
        samples: token ids, [S_i] each.

    Raises:
        UserError: naming the token.
    """
    if not samples:
        return
    try:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # transformers' answer for a model without one
        return
    weights = (getattr(table, "weight", None) for table in tables)
    rows = min((len(one) for one in weights if isinstance(one, torch.Tensor)), default=None)
    largest = max(int(ids.max(initial=0)) for ids in samples)
    if rows is not None and largest >= rows:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(largest)!r} of the text has the id "
            f"{largest:,}, and {name} has rows for {rows:,} ids: give the tokenizer that it was "
            "trained with, or leave that token out of the text"
        )


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model below its head, whatever a class says that it is called.

    Llama-4's text model names a base that it does not have, and is then its own.
    """
    base: Any = model.base_model
    if base is not model:
        return base
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        return model
    has_head = inner[0].get_output_embeddings() is not None
    return base_of(inner[0]) if has_head else inner[0]


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on its device, in evaluation mode; its head in float32.

    A head in half precision would round the logits (bfloat16 to 3 digits); so what stands behind
    the base model keeps float32, and its input is widened. Where the two share a weight, as a
    language model's head and its embeddings do, the head gets its own copy. A quantised model
    stays where it was loaded.
    """
    if not is_quantized(model):
        torch.nn.Module.to(model, device=device)  # in place, as for every module
    base = base_of(model)
    in_base = {id(module) for module in base.modules()}
    of_base = {id(parameter) for parameter in base.parameters()}
    for module in model.modules():
        if id(module) not in in_base and any(map(_is_half, module.parameters(recurse=False))):
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in of_base:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().float()))
                else:
                    parameter.data = parameter.data.float()
            module.register_forward_pre_hook(_widen)
    if device.type == "cuda":
        warn_of_missing_kernels(model, missing_libraries(model))
    return model.eval()


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a quantiser of transformers made its weights, which are then not all numbers."""
    return getattr(model.config, "quantization_config", None) is not None


def _is_half(parameter: torch.nn.Parameter) -> bool:
    plain = type(parameter.data) is torch.Tensor
    return plain and parameter.dtype in (torch.bfloat16, torch.float16)


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
    return _without_infinities(described)


def _without_infinities(value: Any) -> Any:
    """JSON has no infinite numbers (Mamba-2's limit of a step): as transformers writes them."""
    if isinstance(value, dict):
        return {name: _without_infinities(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    return value


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


def hash_files(name: str) -> str:
    """SHA-256 (hex) of a checkpoint's weight files, in order of names.

    For quantised ones: their state dict has more than tensors of numbers, and asking bitsandbytes
    for it changes what the model says afterwards.

    Args:
        name: hub id, of which the files were downloaded, or folder.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "config.json", local_files_only=True))).parent
    digest = hashlib.sha256()
    for path in sorted(one for one in folder.iterdir() if one.suffix in WEIGHT_FILES):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_model(
    auto_class: Any,
    name: str,
    *,
    what: str,
    content: str,
    trust_remote_code: bool,
    with_attention: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model as transformers does.

    Args:
        auto_class: of transformers.
        name: hub id or folder.
        what: it is called in a message.
        content: of the folder that is expected, in a message.
        trust_remote_code: run the code that a hub repository brings.
        with_attention: that forms its maps: slower, in more memory, rounded otherwise.
        device: of a quantised model, which stays where it is loaded; others are on the CPU.
        dtype: number format of all that the model does not keep in float32.

    Returns:
        The model, and the names of its weights that are in no file.

    Raises:
        UserError: if it cannot be found or loaded.
    """
    require_folder(name, content, option="--teacher")
    try:
        config = AutoConfig.from_pretrained(
            name, local_files_only=is_local_only(name), trust_remote_code=trust_remote_code
        )
        is_plain = getattr(config, "quantization_config", None) is None
        placed = {} if is_plain else {"device_map": str(device)}
        model, info = auto_class.from_pretrained(
            name,
            local_files_only=is_local_only(name),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=EAGER if with_attention else None,
            **placed,
        )
    except LOADING_FAILURES as error:
        raise UserError(could_not_load(what, name, error, option="--teacher")) from error
    return recurrences_by_device(model), sorted(info["missing_keys"])


def settle_pad_id(name: str, config: PreTrainedConfig, tokenizer: Tokenizer) -> int:
    """The id that fills batches: the model's, else the tokenizer's padding or end-of-text token.

    Decoders pool at the last token that is not the model's padding, so both must be the same; a
    model that names none is told.

    Raises:
        UserError: if neither names one.
    """
    candidates = (named_pad_id(config), tokenizer.pad_token_id, tokenizer.eos_token_id)
    for candidate in candidates:
        if isinstance(candidate, int):
            config.pad_token_id = config.get_text_config().pad_token_id = candidate
            return candidate
    raise UserError(
        f"the tokenizer of {name} has neither a padding nor an end-of-text token, so samples "
        "cannot be batched: set its pad_token"
    )


def named_pad_id(config: PreTrainedConfig) -> int | None:
    """The padding id that a configuration names, itself or of its text model; -1 names none."""
    found = (getattr(one, "pad_token_id", None) for one in (config, config.get_text_config()))
    return next((one for one in found if isinstance(one, int) and one >= 0), None)


def pool_at_the_end(model: PreTrainedModel, pad_id: int) -> None:
    """Let a decoder whose configuration names no padding pool where it does of a text alone.

    That is the last token, whatever it is; told of a padding id, it would pass over those at the
    end of a text. So it is told only in a pass that has padding (transformers,
    `GenericForSequenceClassification`).
    """
    configs = (model.config, model.config.get_text_config())

    def tell(_: torch.nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        for config in configs:
            config.pad_token_id = NO_ID if mask is None or bool(mask.all()) else pad_id

    def forget(*_: Any) -> None:
        for config in configs:
            config.pad_token_id = pad_id

    model.register_forward_pre_hook(tell, with_kwargs=True)
    model.register_forward_hook(forget, always_call=True)


def keep_attention(model: PreTrainedModel) -> None:
    """Let each pass begin with the attention that the model was loaded with.

    BigBird changes to full attention at a short batch and never back, so that what it says of a
    text depends on what it read before.
    """
    for module in model.modules():
        change = getattr(module, "set_attention_type", None)
        if isinstance(module, PreTrainedModel) and change is not None:
            loaded = getattr(module, "attention_type", None)
            if isinstance(loaded, str):
                module.register_forward_pre_hook(partial(_change_back, loaded))


def _change_back(loaded: str, module: Any, _: Any) -> None:
    if module.attention_type != loaded:
        module.set_attention_type(loaded)


def read_segments(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Give the segments that a tokenizer gives of a text alone, where these are not all 0.

    XLNet's `<cls>` at the end of a text is of a segment of its own.
    """
    found = tokenizer("a b c")
    segments = found.get("token_type_ids") or []
    segment_of = {i: s for i, s in zip(found["input_ids"], segments, strict=bool(segments)) if s}
    if not segment_of:
        return

    def give(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "token_type_ids" in kwargs:  # of a pair, which its ids do not tell
            return args, kwargs
        ids = kwargs["input_ids"]
        types = torch.zeros_like(ids)
        for token_id, segment in segment_of.items():
            types[ids == token_id] = segment
        return args, kwargs | {"token_type_ids": types}

    model.register_forward_pre_hook(give, with_kwargs=True)


def reads_token_types(model: PreTrainedModel, tokenizer: Tokenizer) -> bool:
    """Whether a model is told which text of a pair a token is of, besides separators.

    Raises:
        UserError: if its tokenizer numbers more texts than it has embeddings of.
    """
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    given = tokenizer("a", "b").get("token_type_ids") or []
    num_known = getattr(model.config, "type_vocab_size", None)
    if not takes or not any(given) or num_known == 0:
        return False
    if num_known is not None and max(given) >= num_known:
        raise UserError(
            f"the tokenizer gives the tokens of a pair the types 0 to {max(given)}, and the model "
            f"knows {num_known}: give the tokenizer that it was trained with"
        )
    return True


def hold_tied_weights_once(module: nn.Module) -> Mapping[str, str]:
    """Leave all names but the first out of a module's state, and fill them in on loading.

    safetensors refuses two names for one weight, and a Trainer saves what is trained, which may be
    more than the model of transformers that would see to it. A module inside may do the same.

    Args:
        module: with all its parameters.

    Returns:
        The names that are left out, each with the one under which its weight is held.
    """
    first: dict[int, str] = {}
    tied = {
        name: first[id(one)]
        for name, one in module.named_parameters(remove_duplicate=False)
        if first.setdefault(id(one), name) != name
    }

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in tied:
            state.pop(prefix + name, None)  # a module inside may have left it out

    def fill_in(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name, held in tied.items():
            state[prefix + name] = state[prefix + held]

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(fill_in)
    return tied
