"""A student that is one of transformers' models: a classifier or a causal language model.

It starts from its own weights and tokenizer. A classifier gets the cache's classes and no position
map: where it pools is its own business (an encoder at its CLS token, a decoder at the last token
that is not its padding).

A language model reads packed rows, across whose borders nothing looks. What the teacher's side
measures (`stages.models.causal`) holds for a student too: a model that *packs* gets position ids
that begin anew with each document, and no mask, from which transformers makes masks of each layer's
own kind; for any other model each document becomes a row of its own. Here with gradients, and from
batches as training makes them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import has_file

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.stages.data.labels import is_generic
from teacher_cache.stages.heads import SINGLE, Head
from teacher_cache.stages.models.batching import PADDED, Batching
from teacher_cache.stages.models.causal import language_model_batching
from teacher_cache.stages.models.device import recurrences_by_device
from teacher_cache.stages.models.head import LanguageModelHead, LinearHead
from teacher_cache.stages.models.pretrained import (
    base_of,
    described_config,
    hash_weights,
    hold_tied_weights_once,
    num_positions,
    settle_pad_id,
)
from teacher_cache.stages.student.scans.unpacking import lay_end_to_end, plan_rows
from teacher_cache.stages.tokens.tokenizers import could_not_load, is_local_only, require_folder

OPTION = "--arch hf:"
# With any of these there are weights; those of other libraries are transformers' to refuse.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
)
# AutoTokenizer would make an empty tokenizer where there is none of these.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


logger = logging.getLogger(__name__)


def classifier_config(name: str) -> PreTrainedConfig:
    """The configuration of a hub id or folder that can be a classifier.

    Raises:
        UserError: if it is not there, cannot be read, or is of a type without a classifier.
    """
    config = read_config(name)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"hf:{name} is a {config.model_type}, of which transformers has no sequence "
            "classifier: choose another model"
        )
    return config


def own_tokenizer(name: str) -> str | None:
    """Where the model's own tokenizer is, which is where the model is; None if it has none.

    Raises:
        UserError: if there is no such folder or repository.
    """
    require_folder(name, "a model", option=OPTION)
    is_local = is_local_only(name)
    try:
        if any(has_file(name, file, local_files_only=is_local) for file in TOKENIZERS):
            return name
    except OSError as error:
        raise UserError(could_not_load("model", name, error, option=OPTION)) from error
    logger.warning("hf:%s has no tokenizer of its own here: it gets the cache's", name)
    return None


def pretrained_classifier(
    name: str,
    *,
    tokenizer: Tokenizer,
    id2label: Mapping[int, str],
    seed: int,
    head: Head = SINGLE,
) -> PreTrainedModel:
    """A classifier in float32 with the model's weights, and fresh ones where it has none.

    A head is kept if its classes have the names of `id2label` and it is of the same kind, and
    replaced by a fresh one if not. What is fresh depends on `seed` alone, and the log names it; a
    folder that holds only a configuration gives a classifier that is all fresh. The global random
    state is neither read nor changed.

    Args:
        name: hub id or folder.
        tokenizer: the student's, of which every id must have an embedding.
        id2label: class names by id.
        seed: of the fresh weights.
        head: what its outputs mean.

    Raises:
        UserError: if the model cannot be loaded, is no classifier, or does not fit the tokenizer.
    """
    config = classifier_config(name)
    class_names = {int(class_id): label for class_id, label in (config.id2label or {}).items()}
    is_alike = config.problem_type in (None, head.name)
    keeps_head = class_names == dict(id2label) and not is_generic(id2label) and is_alike
    config.id2label = dict(id2label)
    config.label2id = {label: class_id for class_id, label in id2label.items()}
    config.problem_type = head.name  # what a pipeline makes of the logits
    pad_id = settle_pad_id(name, config, tokenizer)
    _refuse_padding_that_is_text(name, pad_id, tokenizer)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if is_config_alone(name):
                logger.warning("hf:%s has no weights: all start fresh, from the seed", name)
                model = _fresh(config)
            else:
                model = _load(name, config, keeps_head=keeps_head)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # torch's, safetensors'
        raise UserError(could_not_load("classifier", name, error, option=OPTION)) from error
    refuse_missing_rows(name, model, max(max(tokenizer.get_vocab().values()), pad_id))
    return recurrences_by_device(model)


def refuse_too_long(
    name: str, model: PreTrainedModel, *, longest_sample: int, max_length: int
) -> None:
    """Refuse samples, and new texts, that the model has no positions for.

    Args:
        name: hub id or folder.
        model: the student.
        longest_sample: tokens of the longest cached sample.
        max_length: tokens at which the student will cut new texts.

    Raises:
        UserError: with the limit that fits.
    """
    positions = num_positions(model)
    if positions is None:
        return
    if longest_sample > positions:
        raise UserError(
            f"hf:{name} reads {positions:,} tokens, and the longest cached sample has "
            f"{longest_sample:,}: choose a model that reads more, or make a cache with "
            f"--max-length {positions}"
        )
    if max_length > positions:
        raise UserError(
            f"hf:{name} reads {positions:,} tokens, and would get new texts of up to "
            f"{max_length:,}: give --max-length {positions} (no sample that it trains on is longer)"
        )


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a run's settings record of the weights and configuration that it starts from."""
    return {
        "architecture": type(model).__name__,
        "weights_sha256": hash_weights(model),
        "config_sha256": fingerprint(described_config(model)),
        "commit": getattr(model.config, "_commit_hash", None),
    }


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a hub id or folder.

    Raises:
        UserError: if it is not there or cannot be read.
    """
    require_folder(name, "a model", option=OPTION)
    try:
        return AutoConfig.from_pretrained(
            name, local_files_only=is_local_only(name), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(could_not_load("model", name, error, option=OPTION)) from error


def is_config_alone(name: str) -> bool:
    """Whether it is a folder without weights; a hub id without them is transformers' to refuse."""
    return Path(name).is_dir() and not any((Path(name) / file).is_file() for file in WEIGHTS)


def _fresh(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )


def _load(name: str, config: PreTrainedConfig, *, keeps_head: bool) -> PreTrainedModel:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        config=config,
        local_files_only=is_local_only(name),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for other classes gives way to a new one
        trust_remote_code=False,
    )
    in_base = {id(parameter) for parameter in model.base_model.parameters()}
    names = {one: id(parameter) in in_base for one, parameter in model.named_parameters()}
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if fresh.issuperset(one for one, is_base in names.items() if is_base):
        raise UserError(
            f"the weights of hf:{name} hold none of a {type(model).__name__}: give a model of the "
            "type that its config.json names"
        )
    if not keeps_head:
        fresh.update(one for one, is_base in names.items() if not is_base)
        headless, model = model, _fresh(config)
        model.base_model.load_state_dict(headless.base_model.state_dict())
    if fresh:
        logger.info("hf:%s: fresh, from the seed: %s", name, ", ".join(sorted(fresh)))
    return model


def _refuse_padding_that_is_text(name: str, pad_id: int, tokenizer: Tokenizer) -> None:
    """A decoder pools at the last token that is not padding, so no text may become that id."""
    is_special = pad_id in tokenizer.all_special_ids or pad_id in tokenizer.added_tokens_decoder
    if not is_special and pad_id in tokenizer.get_vocab().values():
        raise UserError(
            f"hf:{name} pads with the id {pad_id}, which to the student's tokenizer is the token "
            f"{tokenizer.convert_ids_to_tokens(pad_id)!r}: set pad_token_id in its config.json to "
            "the id of a special token, or choose a model of the cache's tokenizer"
        )


def refuse_missing_rows(name: str, model: PreTrainedModel, highest_id: int) -> None:
    """Refuse a model whose table has no row for some id.

    Raises:
        UserError: with both numbers.
    """
    embeddings: Any = model.get_input_embeddings()
    num_rows = len(embeddings.weight)
    if num_rows <= highest_id:
        raise UserError(
            f"hf:{name} has embeddings for {num_rows:,} tokens, and the student's tokenizer has "
            f"ids up to {highest_id:,}: choose a model of the cache's tokenizer"
        )


@dataclass(frozen=True, kw_only=True)
class PretrainedLanguageModel:
    """A causal language model, and what was measured of it.

    Attributes:
        model: in float32, on the CPU.
        batching: which documents share a pass.
    """

    model: PreTrainedModel
    batching: Batching


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
    name: str, *, tokenizer: Tokenizer, max_length: int, seed: int
) -> PretrainedLanguageModel:
    """A causal language model in float32 with its own weights.

    A folder that holds only a configuration gives one that is all fresh, from `seed`. The global
    random state is neither read nor changed.

    Args:
        name: hub id or folder.
        tokenizer: the student's, of which every id must have an embedding and a logit.
        max_length: the longest sample in tokens.
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
                model = _load_language_model(name, config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # torch's, safetensors'
        raise UserError(could_not_load("language model", name, error, option=OPTION)) from error
    highest_id = max(tokenizer.get_vocab().values())
    refuse_missing_rows(name, model, highest_id)
    longest = min(max_length, num_positions(model) or max_length)  # `refuse_too_long` follows
    batching = language_model_batching(
        f"hf:{name}",
        recurrences_by_device(model.eval()),
        max_length=longest,
        num_ids=highest_id + 1,
    )
    _check_head(name, model, highest_id=highest_id)
    return PretrainedLanguageModel(model=model, batching=batching)


def _load_language_model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
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


def _check_head(name: str, model: PreTrainedModel, *, highest_id: int) -> None:
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
    try:
        LanguageModelHead.measured(model)
    except UserError as error:
        raise UserError(
            f"hf:{name}: the loss runs the head on a few positions at a time, and {error}; {remedy}"
        ) from error


@dataclass
class PackedStates(ModelOutput):
    """What the head reads.

    Attributes:
        final_states: [B, S, D].
        head: the head's parameters. A loss multiplies with them outside of this forward pass;
            data parallelism counts those as used that it sees among the outputs.
    """

    final_states: Tensor | None = None
    head: tuple[Tensor, ...] | None = None


class PackedLanguageModel(nn.Module):
    """What is trained of a pre-trained student: its base on packed rows, and its head.

    Its state has each tied weight once. Only `student` is the result.

    Args:
        student: to be trained; shared, not copied.
        batching: which documents share a pass.
    """

    def __init__(self, student: PreTrainedModel, *, batching: Batching) -> None:
        super().__init__()
        self.student = student
        self._batching = batching
        hold_tied_weights_once(self)

    @property
    def output_head(self) -> LinearHead:
        """The student's head."""
        return LinearHead.of(self.student)

    def get_input_embeddings(self) -> nn.Module:
        """The student's."""
        return self.student.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        seq_idx: Tensor,
        use_cache: Literal[False] = False,
        states_only: Literal[True] = True,
    ) -> PackedStates:
        """Final states, each document's as if it stood alone.

        Args:
            input_ids: [B, S] integers, padded on the right.
            attention_mask: [B, S], nonzero at real tokens.
            seq_idx: [B, S] integers that number the documents of a row; a row's padding counts to
                its last document, which cannot see it.
            use_cache: training keeps no cache.
            states_only: logits are the loss's to compute.
        """
        run = self._packed if self._batching.rows == "packed" else self._row_a_document
        head = self.output_head
        parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
        return PackedStates(
            final_states=run(input_ids, attention_mask, seq_idx),
            head=tuple(one.view_as(one) for one in parameters),
        )

    def _packed(self, input_ids: Tensor, _: Tensor, seq_idx: Tensor) -> Tensor:
        base: Any = base_of(self.student)
        output = base(input_ids=input_ids, position_ids=places(seq_idx), use_cache=False)
        return output.last_hidden_state

    def _row_a_document(self, input_ids: Tensor, attention_mask: Tensor, seq_idx: Tensor) -> Tensor:
        # Padding becomes a document of its own, so that no row is longer for it.
        plan = plan_rows(torch.where(attention_mask != 0, seq_idx, -1))
        if plan is None:
            return self._rows(input_ids, attention_mask)
        groups = []
        for group in plan.groups:
            mask = group.padding.logical_not().to(attention_mask.dtype)
            groups.append(self._rows(group.rows_of(input_ids), mask))
        return lay_end_to_end(groups)[plan.places].unflatten(0, input_ids.shape)

    def _rows(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States [R, S, D] of rows [R, S] that are padded on the right.

        Those of padding are 0 where not all rows share a pass.
        """
        base: Any = base_of(self.student)
        if self._batching == PADDED:
            return base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        lengths = mask.sum(dim=1).tolist()
        kinds = [np.empty(int(length), np.uint32) for length in lengths]
        states = torch.zeros(())
        for batch in self._batching.batches(kinds, max_tokens=mask.numel()):
            rows = torch.from_numpy(batch).to(ids.device)
            width = len(kinds[batch[0]])  # the longest stands first
            found = base(
                input_ids=ids[rows, :width], attention_mask=mask[rows, :width], use_cache=False
            ).last_hidden_state
            if not states.ndim:
                states = found.new_zeros(*ids.shape, found.shape[-1])
            states = states.index_put(
                (rows[:, None], torch.arange(width, device=ids.device)), found
            )
        return states


def places(seq_idx: Tensor) -> Tensor:
    """Each token's place in its document, from 0: [B, S] int64.

    Args:
        seq_idx: [B, S] integers; a document begins wherever the value changes.
    """
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand(seq_idx.shape)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = torch.where(begins, position, 0).cummax(dim=1).values
    return position - starts
