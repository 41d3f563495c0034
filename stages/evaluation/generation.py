"""Text that a language model writes behind a prompt."""

from __future__ import annotations

from typing import Any

import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.evaluation.config import GenerationOptions
from teacher_cache.stages.evaluation.models import LanguageModel

DEFAULT_NEW_TOKENS = 50


def check_generation(options: GenerationOptions) -> None:
    """Refuse what would do nothing.

    Raises:
        UserError: if options of drawing are given, and nothing is drawn.
    """
    idle = [one for one in options.given if one in ("--temperature", "--seed")]
    if idle and not options.do_sample:
        raise UserError(
            f"{' and '.join(idle)} is of --do-sample, and the most probable token is taken: give "
            "--do-sample, or leave that out"
        )


def continuation(model: LanguageModel, prompt: list[int], options: GenerationOptions) -> str:
    """What the model writes behind a prompt; the same whatever it wrote before.

    A Mamba student reads the prompt once and then goes on from its state, one token at a time.

    Args:
        model: in evaluation mode.
        prompt: its tokens, at least one.
        options: checked by `check_generation`.

    Raises:
        UserError: if the model has no positions for so many tokens.
    """
    num_new = options.max_new_tokens or DEFAULT_NEW_TOKENS
    if len(prompt) + num_new > model.num_positions:
        raise UserError(
            f"{model.name} reads {model.num_positions:g} tokens, and the prompt's {len(prompt)} "
            f"and --max-new-tokens {num_new} are more: give less"
        )
    ids = torch.tensor([prompt], device=model.model.device)
    drawing: dict[str, Any] = {"do_sample": False}
    if options.do_sample:
        # Of the whole vocabulary: no top-k or top-p that nobody asked for.
        drawing = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        drawing["temperature"] = float(options.temperature or 1)
    generator: Any = model.model
    is_on = model.autocast is not torch.float32
    devices = [ids.device] if ids.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(),
        torch.autocast(ids.device.type, model.autocast, enabled=is_on),
    ):
        torch.manual_seed(options.seed or 0)
        found = generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            pad_token_id=generator.config.pad_token_id or generator.config.eos_token_id or 0,
            **drawing,
        )
    written = found[0, len(prompt) :].tolist()
    return str(model.tokenizer.decode(written, skip_special_tokens=True))


def prompt_ids(model: LanguageModel, text: str) -> list[int]:
    """The tokens of a text to go on with: without an end that the tokenizer puts behind it.

    Raises:
        UserError: if there are none.
    """
    ids = list(model.tokenizer(text, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == model.tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise UserError("there is no text to go on with: give one")
    return ids
