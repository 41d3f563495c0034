"""SmolLM2-135M as a folder that stage one loads, converted once from the packaged GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from benchmarks.packaged_tokenizers import SMOLLM2_FILE, smollm2_tokenizer_folder
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.tokens.tokenizers import load_tokenizer, save_tokenizer

NAME = "smollm2"
READER = "gguf"
LAST_FILE = "tokenizer.json"  # written last: the folder is whole where it is there


def smollm2_folder(folder: Path, *, instead: str) -> Path:
    """Convert the model into a folder, unless it is there; returns the folder.

    Args:
        folder: where it goes.
        instead: how a user does without, for a message.

    Raises:
        UserError: if the reader of GGUF files is not installed, or the package cannot be fetched.
    """
    if (folder / LAST_FILE).is_file():
        return folder
    if importlib.util.find_spec(READER) is None:
        raise UserError(
            f"SmolLM2 comes as a GGUF file, and the package {READER} that reads it is not "
            f"installed: pip install {READER}, or {instead}"
        )
    tokenizer = load_tokenizer(str(smollm2_tokenizer_folder()), option="--teacher")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        fetch(NAME), gguf_file=SMOLLM2_FILE
    )
    # The loaded one remembers that it was quantised, and would not save.
    config: Any = loaded.config
    plain: Any = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    return folder
