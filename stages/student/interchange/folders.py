"""A student as a folder that other programs load without this package.

For transformers a language model becomes `MambaForCausalLM` or `Mamba2ForCausalLM`, and a
classifier transformers' own backbone with a file of code that stands beside the weights. mamba_ssm
has language models alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.commit import explained
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.student.backbone import MambaStudentPreTrainedModel
from teacher_cache.stages.student.classifier import MambaStudentForSequenceClassification
from teacher_cache.stages.student.interchange.mamba_ssm import save_mamba_ssm
from teacher_cache.stages.student.interchange.remote_classifier import (
    DistilledMambaConfig,
    DistilledMambaForSequenceClassification,
)
from teacher_cache.stages.student.interchange.transformers_mamba import to_transformers
from teacher_cache.stages.student.interchange.weights import filled
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM


def write_transformers(
    model: PreTrainedModel, tokenizer: Tokenizer | None, out: Path, *, source: str
) -> None:
    """Write a folder that transformers loads by itself.

    Args:
        model: a Mamba student in one direction, a classifier or a language model.
        tokenizer: of the student.
        out: the folder; new, or empty.
        source: what is written, as a sentence begins.

    Raises:
        UserError: if transformers has no counterpart, the folder holds something, or the file
            system refuses.
    """
    _refuse_full(out)
    if isinstance(model, MambaStudentForSequenceClassification):
        moved = as_remote_classifier(model)
    elif isinstance(model, MambaStudentForCausalLM):
        moved = to_transformers(model)
    else:
        raise UserError(
            f"{source} is a {type(model).__name__} of transformers already: its folder loads as it "
            "is"
        )
    _save(out, moved.save_pretrained, tokenizer)


def write_mamba_ssm(
    model: PreTrainedModel, tokenizer: Tokenizer | None, out: Path, *, source: str
) -> None:
    """Write a folder that mamba_ssm's `MambaLMHeadModel.from_pretrained` loads.

    Args:
        model: a Mamba language model in one direction.
        tokenizer: of the student.
        out: the folder; new, or empty.
        source: what is written, as a sentence begins.

    Raises:
        UserError: if mamba_ssm has no counterpart, the folder holds something, or the file system
            refuses.
    """
    _refuse_full(out)
    if not isinstance(model, MambaStudentForCausalLM):
        kind = "classifier" if isinstance(model, MambaStudentPreTrainedModel) else "model"
        raise UserError(
            f"{source} is a {kind} ({type(model).__name__}), and mamba_ssm has Mamba language "
            "models alone: give --to transformers, or such a student"
        )
    _save(out, lambda folder: save_mamba_ssm(model, Path(folder)), tokenizer)


def as_remote_classifier(
    student: MambaStudentForSequenceClassification,
) -> DistilledMambaForSequenceClassification:
    """A classifier that needs torch and transformers alone, and computes the same.

    Raises:
        UserError: for a bidirectional student, which transformers has no mixers for.
    """
    backbone: Any = to_transformers(student.backbone)
    ours, position_map = student.config, student.position_map
    config = DistilledMambaConfig(
        backbone=backbone.config.to_diff_dict() | {"model_type": backbone.config.model_type},
        position_map=position_map.mode,
        appended_id=position_map.token_id,
        pooling="mean" if ours.pooling == "mean" else "last",
        head=ours.head,
        dropout=ours.dropout,
        pad_token_id=ours.pad_token_id,
        id2label=dict(ours.id2label or {}),
        label2id=dict(ours.label2id or {}),
    )
    parts = {"backbone": backbone, "head": student.head}
    tensors = {
        f"{name}.{key}": tensor
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }
    moved = filled(
        DistilledMambaForSequenceClassification, config, tensors, source="This classifier"
    )
    config.register_for_auto_class()
    moved.register_for_auto_class("AutoModelForSequenceClassification")
    return moved.eval()


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: give a folder that is new or empty")


def _save(out: Path, save: Callable[[Any], Any], tokenizer: Tokenizer | None) -> None:
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        save(out)
