"""Load a teacher with its tokenizer, and say exactly which one it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.stages.heads import SINGLE, HeadName, possible_heads
from teacher_cache.stages.models.batching import Batching, Rows
from teacher_cache.stages.models.causal import (
    FILLER_ID,
    language_model_batching,
    own_logits,
)
from teacher_cache.stages.models.device import dtype_name, resolve_device, resolve_dtype
from teacher_cache.stages.models.inference import classifier_batching
from teacher_cache.stages.models.pretrained import (
    LOADING_FAILURES,
    class_names,
    described_config,
    hash_files,
    hash_weights,
    is_quantized,
    keep_attention,
    load_model,
    longest_sample,
    named_pad_id,
    on_device,
    pool_at_the_end,
    read_segments,
    require_rows,
    settle_pad_id,
)
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.tokens.frame import surroundings
from teacher_cache.stages.tokens.tokenizers import is_local_only, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model ready to run.

    Attributes:
        name: hub id or folder, as given.
        model: in evaluation mode, on `device`, in `dtype`.
        tokenizer: untouched, as it was saved.
        pad_id: used to fill batches; masked.
        batching: which samples share a pass, as measured.
        weights_sha256: of all parameters and buffers at float32, by name; of a quantised model, of
            its files.
        config_sha256: of `described_config`: heads, activations, padding token, ...
        commit: of the hub repository, None for a folder.
        how_read: what else changes what it says, for the fingerprint; nothing of most teachers.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    pad_id: int
    batching: Batching
    device: torch.device
    dtype: torch.dtype
    weights_sha256: str
    config_sha256: str
    commit: str | None
    how_read: Mapping[str, Any]

    def require_rows(self, samples: Sequence[np.ndarray]) -> None:
        """As `pretrained.require_rows` of samples [S_i] each."""
        require_rows(self.name, self.model, self.tokenizer, samples)

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
        heads: the kinds of head that it may have: one where its configuration says which.
    """

    id2label: dict[int, str]
    heads: tuple[HeadName, ...] = (SINGLE.name,)


def load_teacher(config: TeacherConfig, *, with_attention: bool = False) -> ClassificationTeacher:
    """Load a classifier onto its device, in its number format.

    Args:
        config: the teacher and where it runs.
        with_attention: whether attention maps are to be had.

    Raises:
        UserError: if it cannot be found or loaded, has no trained classification head, or cannot
            be read from.
    """
    loading = _Loading.of(config, _CLASSIFIER, with_attention=with_attention)
    model, tokenizer = loading.model, loading.tokenizer
    names_padding = named_pad_id(model.config) is not None
    pad_id = settle_pad_id(config.teacher, model.config, tokenizer)
    config_sha256 = fingerprint(described_config(model))
    heads = possible_heads(config.teacher, model.config.problem_type, len(class_names(model)))
    if model.config.problem_type is None and len(class_names(model)) == 1:
        logger.warning(
            "%s has one output and names no problem_type: it is read as a number, as transformers "
            "trains such a model, and not as a probability",
            config.teacher,
        )
    _warn_of_label_smoothing(config.teacher, model)

    def prepare(model: PreTrainedModel) -> None:
        settle_pad_id(config.teacher, model.config, tokenizer)
        if not names_padding:
            pool_at_the_end(model, pad_id)
        read_segments(model, tokenizer)

    prepare(model)
    eos_id: Any = tokenizer.eos_token_id
    plain = Batching(
        counted_id=eos_id if model.config.is_encoder_decoder else None,
        end_id=None if names_padding else pad_id,
    )
    batching = classifier_batching(
        config.teacher,
        model.eval(),
        tokenizer,
        pad_id=pad_id,
        max_length=longest_sample(config.teacher, model, tokenizer, config.max_length),
        plain=plain,
    )
    ends_in_padding = not names_padding and surroundings(tokenizer).after[-1:] == (pad_id,)
    return ClassificationTeacher(
        **loading.ready(prepare, batching),
        tokenizer=tokenizer,
        pad_id=pad_id,
        config_sha256=config_sha256,
        how_read=loading.how_read(batching) | ({"pools_at": "end"} if ends_in_padding else {}),
        id2label=_checked_names(config.teacher, model),
        heads=heads,
    )


def _checked_names(name: str, model: PreTrainedModel) -> dict[int, str]:
    """Class names by id: one of each logit, and no two alike."""
    names = class_names(model)
    listed = ", ".join(f"{class_id} {one}" for class_id, one in sorted(names.items()))
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{name} numbers its classes {listed}, and has logits 0 to {len(names) - 1}: number "
            "them from 0 without a gap in id2label of its config.json"
        )
    if len(set(names.values())) < len(names):
        raise UserError(
            f"{name} names two classes alike ({listed}): name each in id2label of its config.json"
        )
    return names


def labels_read_by(config: TeacherConfig) -> tuple[HeadName, ...]:
    """The kinds of head that a classifier may have, by its configuration alone.

    Of one that cannot be read, the usual kind: what is wrong is said when it is loaded.

    Raises:
        UserError: if it is a kind that is not served.
    """
    try:
        found = AutoConfig.from_pretrained(
            config.teacher,
            local_files_only=is_local_only(config.teacher),
            trust_remote_code=config.trust_remote_code,
        )
    except LOADING_FAILURES:
        return (SINGLE.name,)
    return possible_heads(config.teacher, found.problem_type, len(found.id2label or {}))


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
        **teacher.how_read,
    }


@dataclass(frozen=True, kw_only=True)
class LanguageModelTeacher(Teacher):
    """A causal language model.

    Attributes:
        num_logits: V, the rows of its head; the tokenizer may use fewer.
    """

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
    loading = _Loading.of(config, _LANGUAGE_MODEL, with_attention=with_attention)
    model, tokenizer = loading.model, loading.tokenizer
    batching = language_model_batching(
        config.teacher,
        model.eval(),
        max_length=longest_sample(config.teacher, model, tokenizer, config.max_length),
        num_ids=max(tokenizer.get_vocab().values()) + 1,
    )
    num_logits = own_logits(model, np.zeros(1, np.uint32)).shape[-1]
    return LanguageModelTeacher(
        **loading.ready(lambda _: None, batching),
        tokenizer=tokenizer,
        pad_id=FILLER_ID,
        config_sha256=fingerprint(described_config(model)),
        how_read=loading.how_read(batching),
        num_logits=num_logits,
    )


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What is loaded.

    Attributes:
        auto_class: of transformers.
        what: it is called in a message.
        content: of its folder.
        usual: how most of its kind read documents together.
        untrained: why a model without some weights is refused, and what to do.
    """

    auto_class: Any
    what: str
    content: str
    usual: Rows
    untrained: str


_CLASSIFIER = _Kind(
    auto_class=AutoModelForSequenceClassification,
    what="classifier",
    content="a fine-tuned classifier",
    usual="padded",
    untrained="so its class logits would be random: fine-tune it first with `pipe "
    "finetune-teacher`, or give a fine-tuned classifier",
)
_LANGUAGE_MODEL = _Kind(
    auto_class=AutoModelForCausalLM,
    what="language model",
    content="a causal language model",
    usual="packed",
    untrained="so its logits would be random: give a causal language model",
)


@dataclass(frozen=True, kw_only=True)
class _Loading:
    """A teacher on its way to its device.

    Attributes:
        config: the teacher and where it runs.
        kind: what it is.
        with_attention: whether attention maps are to be had.
        device: where it will run.
        dtype: in which number format.
        tokenizer: its own.
        model: in float32 on the CPU, where most is measured; a quantised one as it will run.
        weights_sha256: of it, before it read anything.
    """

    config: TeacherConfig
    kind: _Kind
    with_attention: bool
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    model: PreTrainedModel
    weights_sha256: str

    @classmethod
    def of(cls, config: TeacherConfig, kind: _Kind, *, with_attention: bool) -> _Loading:
        """Load tokenizer and model, and hash its weights."""
        device = resolve_device(config)
        tokenizer = load_tokenizer(
            config.teacher, option="--teacher", trust_remote_code=config.trust_remote_code
        )
        model, untrained = _loaded(
            config, kind, torch.float32, device, with_attention=with_attention
        )
        if untrained:
            raise UserError(
                f"{config.teacher} has no trained weights for {', '.join(untrained[:3])}, "
                f"{kind.untrained}"
            )
        keep_attention(model)
        return cls(
            config=config,
            kind=kind,
            with_attention=with_attention,
            device=device,
            dtype=resolve_dtype(config, device),
            tokenizer=tokenizer,
            model=model,
            weights_sha256=hash_files(config.teacher)
            if is_quantized(model)
            else hash_weights(model),
        )

    def ready(
        self, prepare: Callable[[PreTrainedModel], None], batching: Batching
    ) -> dict[str, Any]:
        """What is known of any teacher, and the model where it runs.

        Args:
            prepare: is called with a model that is loaded once more, in another number format.
            batching: as measured.
        """
        if batching.rows != self.kind.usual or batching.borders:
            logger.warning(
                "%s (%s) does not keep documents apart that share a pass in the usual way: %s",
                self.config.teacher,
                type(self.model).__name__,
                batching,
            )
        model = self.model
        if self.dtype is not torch.float32 and not is_quantized(model):
            # transformers keeps what it must in float32; a cast of everything would round it.
            model, _ = _loaded(
                self.config, self.kind, self.dtype, self.device, with_attention=self.with_attention
            )
            keep_attention(model)
            prepare(model)
        return {
            "name": self.config.teacher,
            "model": on_device(model, self.device),
            "batching": batching,
            "device": self.device,
            "dtype": self.dtype,
            "weights_sha256": self.weights_sha256,
            "commit": getattr(model.config, "_commit_hash", None),
        }

    def how_read(self, batching: Batching) -> dict[str, Any]:
        """Absent where values are as those of earlier releases, whose caches keep their names."""
        found = batching.settings()
        if is_quantized(self.model):
            method = self.model.config.quantization_config.to_dict().get("quant_method")
            return found | {"quantization": str(method)}
        if self.dtype is not torch.float32:
            return found | {"float32_parts": "as transformers keeps them"}
        return found


def _loaded(
    config: TeacherConfig,
    kind: _Kind,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_attention: bool,
) -> tuple[PreTrainedModel, list[str]]:
    return load_model(
        kind.auto_class,
        config.teacher,
        what=kind.what,
        content=kind.content,
        trust_remote_code=config.trust_remote_code,
        with_attention=with_attention,
        device=device,
        dtype=dtype,
    )
