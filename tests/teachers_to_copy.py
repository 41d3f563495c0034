"""Tiny random language models of the families whose layers a student can start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

NUM_IDS, NUM_LAYERS = 97, 3
_SIZES: dict[str, Any] = {
    "vocab_size": NUM_IDS, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_HALF: dict[str, Any] = {"partial_rotary_factor": 0.5}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "llama 3 with biases": LlamaConfig(
        **_SIZES, rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True
    ),
    "mistral with a window": MistralConfig(**_SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen2 with yarn": Qwen2Config(**_SIZES, rope_parameters=_YARN),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "granite": GraniteConfig(
        **_SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3,
        logits_scaling=2.0, tie_word_embeddings=True,
    ),
    "gemma": GemmaConfig(**_SIZES, head_dim=8),
    "phi3": Phi3Config(**_SIZES, pad_token_id=0),
    "phi": PhiConfig(**_SIZES, **_HALF),
    "gpt2": GPT2Config(vocab_size=NUM_IDS, n_embd=32, n_layer=NUM_LAYERS, n_head=4, n_positions=64),
}  # fmt: skip


def saved_teacher(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """A model whose every weight is random, biases and norms too, and the folder it lies in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for one in model.parameters():
                one.add_(0.1 * torch.randn_like(one))
    model.save_pretrained(folder)
    return model
