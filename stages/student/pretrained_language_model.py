"""A student that is one of transformers' causal language models, with its weights and tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.causal import check_language_model, final_states, head_logits
from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.student.pretrained import (
    OPTION,
    is_config_alone,
    read_config,
    refuse_missing_rows,
)
from teacher_cache.stages.tokens.tokenizers import could_not_load, is_local_only

_PROBED_IDS = 16
_TOLERANCE = 1e-4  # of the largest logit; both sides are float32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainedLanguageModel:
    """A causal language model, and what was measured of it.

    Attributes:
        model: in float32, on the CPU.
        packs: whether it runs several documents in one row.
    """

    model: PreTrainedModel
    packs: bool


def language_model_config(name: str) -> PreTrainedConfig:
    """The configuration of a hub id or folder that can be a causal language model.

    Raises:
        UserError: if it is not there, cannot be read, or is of a type without one.
    """
    config = read_config(name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"hf:{name} is a {config.model_type}, of which transformers has no causal language "
            "model: choose another model"
        )
    return config


def pretrained_language_model(
    name: str, *, tokenizer: Tokenizer, seed: int
) -> PretrainedLanguageModel:
    """A causal language model in float32 with its own weights.

    A folder that holds only a configuration gives one that is all fresh, from `seed`. The global
    random state is neither read nor changed.

    Args:
        name: hub id or folder.
        tokenizer: the student's, of which every id must have an embedding and a logit.
        seed: of fresh weights.

    Raises:
        UserError: if the model cannot be loaded, lacks weights, looks ahead, has a head that is
            more than a linear layer, a scale and a soft cap, or does not fit the tokenizer.
    """
    config = language_model_config(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if is_config_alone(name):
                logger.warning("hf:%s has no weights: all start fresh, from the seed", name)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=False
                )
            else:
                model = _load(name, config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # torch's, safetensors'
        raise UserError(could_not_load("language model", name, error, option=OPTION)) from error
    highest_id = max(tokenizer.get_vocab().values())
    refuse_missing_rows(name, model, highest_id)
    packs = check_language_model(f"hf:{name}", model.eval())
    _check_head(name, model, packs=packs, highest_id=highest_id)
    return PretrainedLanguageModel(model=model, packs=packs)


def _load(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        local_files_only=is_local_only(name),
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"hf:{name} has no weights for {', '.join(missing[:3])} of a {type(model).__name__}: "
            "give a causal language model, or a folder with its config.json alone to start fresh"
        )
    return model


def _check_head(name: str, model: PreTrainedModel, *, packs: bool, highest_id: int) -> None:
    """Refuse a head that the loss, which runs it on a few positions at a time, could not be."""
    layer: Any = model.get_output_embeddings()
    remedy = "choose a model whose head is a linear layer, with a scale and a soft cap at most"
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"hf:{name} ({type(model).__name__}) has no linear output layer, from which training "
            f"computes its logits: {remedy}"
        )
    if len(layer.weight) <= highest_id:
        raise UserError(
            f"hf:{name} has logits for {len(layer.weight):,} tokens, and the student's tokenizer "
            f"has ids up to {highest_id:,}: choose a model of the cache's tokenizer"
        )
    ids = np.arange(min(_PROBED_IDS, highest_id + 1), dtype=np.uint32)
    states = final_states(model, [ids], [[len(ids)]], packs=packs)
    own = head_logits(model, states)
    with torch.inference_mode():
        apart = float((LanguageModelHead.of(model)(states) - own).abs().max() / own.abs().max())
    if not apart <= _TOLERANCE:
        raise UserError(
            f"the logits of hf:{name} ({type(model).__name__}) are {apart:.1g} of the largest away "
            f"from those of its output layer, so its head does more than training knows: {remedy}"
        )
