"""Load a teacher with its tokenizer, and say exactly which one it is."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.stages.models.causal import (
    FILLER_ID,
    check_language_model,
    own_logits,
)
from teacher_cache.stages.models.device import dtype_name, resolve_device, resolve_dtype
from teacher_cache.stages.models.pretrained import (
    class_names,
    described_config,
    hash_weights,
    load_model,
    longest_sample,
    on_device,
    settle_pad_id,
)
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.tokens.tokenizers import (
    load_tokenizer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model ready to run.

    Attributes:
        name: hub id or folder, as given.
        model: in evaluation mode, on `device`, in `dtype`.
        tokenizer: untouched, as it was saved.
        pad_id: used to fill batches; masked.
        weights_sha256: of all parameters and buffers at float32, by name.
        config_sha256: of `described_config`: heads, activations, padding token, ...
        commit: of the hub repository, None for a folder.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    weights_sha256: str
    config_sha256: str
    commit: str | None

    def max_length(self, requested: int | None) -> int:
        """The longest sample in tokens.

        Raises:
            UserError: if more was asked for than the teacher can read.
        """
        return longest_sample(self.name, self.model, self.tokenizer, requested)


@dataclass(frozen=True, kw_only=True)
class ClassificationTeacher(Teacher):
    """A sequence classifier.

    Attributes:
        id2label: class names by id.
    """

    id2label: dict[int, str]


def load_teacher(config: TeacherConfig, *, with_attention: bool = False) -> ClassificationTeacher:
    """Load a classifier onto its device, in its number format.

    Args:
        config: the teacher and where it runs.
        with_attention: whether attention maps are to be had.

    Raises:
        UserError: if it cannot be found or loaded, or has no trained classification head.
    """
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    tokenizer = load_tokenizer(
        config.teacher, option="--teacher", trust_remote_code=config.trust_remote_code
    )
    model = _load_classifier(
        config.teacher, config.trust_remote_code, with_attention=with_attention
    )
    pad_id = settle_pad_id(config.teacher, model.config, tokenizer)
    _refuse_other_problems(config.teacher, model)
    _warn_of_label_smoothing(config.teacher, model)
    return ClassificationTeacher(
        **_ready(config, model, device, dtype),
        tokenizer=tokenizer,
        pad_id=pad_id,
        id2label=class_names(model),
    )


def _ready(
    config: TeacherConfig, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What is known of any teacher; hashed as it was loaded, and then put where it runs."""
    weights_sha256 = hash_weights(model)
    return {
        "name": config.teacher,
        "model": on_device(model, device, dtype),
        "device": device,
        "dtype": dtype,
        "weights_sha256": weights_sha256,
        "config_sha256": fingerprint(described_config(model)),
        "commit": getattr(model.config, "_commit_hash", None),
    }


def _load_classifier(
    name: str, trust_remote_code: bool, *, with_attention: bool
) -> PreTrainedModel:
    model, untrained = load_model(
        AutoModelForSequenceClassification,
        name,
        what="classifier",
        content="a fine-tuned classifier",
        trust_remote_code=trust_remote_code,
        with_attention=with_attention,
    )
    if untrained:
        raise UserError(
            f"{name} has no trained weights for {', '.join(untrained[:3])}, so its class logits "
            "would be random: fine-tune it first with `pipe finetune-teacher`, or give a "
            "fine-tuned classifier"
        )
    return model


def _refuse_other_problems(name: str, model: PreTrainedModel) -> None:
    """Refuse a teacher whose logits are not those of one class of several.

    Raises:
        UserError: saying what it is.
    """
    kind, num = getattr(model.config, "problem_type", None), model.config.num_labels
    if kind == "multi_label_classification":
        raise UserError(
            f"{name} is a multi-label classifier (its problem_type says so), which gives each of "
            f"its {num} labels a probability of its own; served are teachers that choose one of "
            "several classes: give such a one, or fine-tune one with `pipe finetune-teacher`"
        )
    if kind == "regression" or num < 2:
        raise UserError(
            f"{name} gives {num} number{'s' if num > 1 else ''} and no classes "
            f"({'its problem_type is regression' if kind else 'it has one label'}): give a teacher "
            "that chooses one of several classes"
        )


def _warn_of_label_smoothing(name: str, model: PreTrainedModel) -> None:
    """A smoothed teacher has nearly equal wrong classes: there is nothing to learn at high T."""
    smoothing = getattr(model.config, "label_smoothing", 0) or 0
    card = Path(name) / "README.md"
    if not smoothing and card.is_file():
        found = re.search(r"label.smoothing\D{0,30}(0?\.\d+)", card.read_text(), re.IGNORECASE)
        smoothing = float(found.group(1)) if found else 0
    if smoothing:
        logger.warning(
            "the card or configuration of %s says it was trained with label smoothing %s: its "
            "logits say little beyond the label, so a temperature above 1 will not help",
            name,
            smoothing,
        )


def identity(teacher: Teacher, tokenizer_sha256: str) -> dict[str, Any]:
    """What the fingerprint records of the teacher."""
    return {
        "weights_sha256": teacher.weights_sha256,
        "config_sha256": teacher.config_sha256,
        "commit": teacher.commit,
        "architecture": type(teacher.model).__name__,
        "tokenizer_sha256": tokenizer_sha256,
        "dtype": dtype_name(teacher.dtype),
    }


@dataclass(frozen=True, kw_only=True)
class LanguageModelTeacher(Teacher):
    """A causal language model.

    Attributes:
        packs: whether several documents of a sequence run in one row.
        num_logits: V, the rows of its head; the tokenizer may use fewer.
    """

    packs: bool
    num_logits: int


def load_language_model(
    config: TeacherConfig, *, with_attention: bool = False
) -> LanguageModelTeacher:
    """Load a causal language model onto its device, in its number format; its head in float32.

    Args:
        config: the teacher and where it runs.
        with_attention: whether its attention maps can be had, as `load_model` says.

    Raises:
        UserError: if it cannot be found or loaded, lacks trained weights, looks ahead, or its head
            cannot be told from its base.
    """
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    tokenizer = load_tokenizer(
        config.teacher, option="--teacher", trust_remote_code=config.trust_remote_code
    )
    model, untrained = load_model(
        AutoModelForCausalLM,
        config.teacher,
        what="language model",
        content="a causal language model",
        trust_remote_code=config.trust_remote_code,
        with_attention=with_attention,
    )
    if untrained:
        raise UserError(
            f"{config.teacher} has no trained weights for {', '.join(untrained[:3])}, so its "
            "logits would be random: give a causal language model"
        )
    packs = check_language_model(config.teacher, model.eval())
    return LanguageModelTeacher(
        **_ready(config, model, device, dtype),
        tokenizer=tokenizer,
        pad_id=FILLER_ID,
        packs=packs,
        num_logits=own_logits(model, np.zeros(1, np.uint32)).shape[-1],
    )
