"""Tiny models, randomly initialised, with real tokenizers: teachers for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from teacher_cache.stages.models.device import recurrences_by_device

CLASS_NAMES = {0: "neg", 1: "pos"}


def write_tiny_bert(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    classes: dict[int, str] = CLASS_NAMES,
    **changes: Any,
) -> Path:
    """A 2-layer BERT classifier of width 32 for these classes, neg and pos; returns its folder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        id2label=classes,
        label2id={name: class_id for class_id, name in classes.items()},
        **changes,
    )
    return _save(folder, BertForSequenceClassification(config), tokenizer)


def write_tiny_gpt2(folder: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Path:
    """A 2-layer GPT-2 classifier of width 32, as the imdb preset's teacher; returns its folder."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=512,
        id2label={0: "LABEL_0", 1: "LABEL_1"},
    )
    return _save(folder, GPT2ForSequenceClassification(config), tokenizer)


def tiny_language_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A causal language model of this configuration, with weights wide enough to tell apart."""
    torch.manual_seed(seed)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return recurrences_by_device(model)


def write_tiny_language_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> Path:
    """A 2-layer GPT-2 of width 32; returns its folder."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=512)
    return _save(folder, tiny_language_model(config, seed=seed), tokenizer)


def write_start(folder: Path, arch: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model for a student to start from, without dropout; returns its folder.

    Args:
        folder: to write to.
        arch: `gpt2`, whose head is its table, or `llama`, here with a head of its own.
        tokenizer: of the cache.
    """
    if arch == "gpt2":
        config: PreTrainedConfig = GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
    return _save(folder, tiny_language_model(config, seed=5), tokenizer)


def _save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Path:
    # Wider logits than a fresh head's, so that classes and confidences differ between documents.
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score")):
            parameter.data *= 20
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)
    return folder
