"""A causal language model's complete head: from the states that it reads to the logits.

`logits = cap(scale * (states @ weight.T + bias))`, where `cap(x) = c * tanh(x / c)` if there is a
soft cap. It lies in the cache's `teacher` folder once, so that cached states give logits again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import Manifest, read_teacher_file
from teacher_cache.stages.tokens.support import Support


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """`logits = cap(scale * (states @ weight.T + bias))`; `cap` as in `LanguageModelHead`.

    Attributes:
        weight: [V, D], the parameter itself: it gets the gradient.
        bias: [V], likewise, or None.
        scale: of what stands before the soft cap.
        soft_cap: nats, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LinearHead:
        """The head of a causal language model whose output layer is linear.

        Raises:
            UserError: if it is not.
        """
        stored = LanguageModelHead.of(model)
        layer = model.get_output_embeddings()
        assert layer is not None, "its weight was found"
        return cls(
            weight=layer.weight,  # pyright: ignore[reportArgumentType]  (of a linear layer)
            bias=layer.bias,  # pyright: ignore[reportArgumentType]
            scale=stored.scale,
            soft_cap=stored.soft_cap,
        )


HEAD_FILE = "language_model_head.safetensors"
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
SOFT_CAPS = ("final_logit_softcapping",)  # Gemma
# Of the spread of a position's logits; what f16 rounds off states is a tenth of it.
TOLERANCE = 0.02
LEAST_TOLERANCE = 1e-3  # nats


@dataclass(frozen=True, kw_only=True)
class LanguageModelHead:
    """From states to logits.

    Attributes:
        weight: [R, D], any number format.
        bias: [R], or None.
        scale: of what stands before the soft cap.
        soft_cap: nats, or None.
        unused: ids whose logits are -inf.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    unused: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> LanguageModelHead:
        """The head of a causal language model, by its output layer and its configuration.

        `check_head` says whether that is all of it.

        Raises:
            UserError: if its output layer is not linear.
        """
        layer = _output_layer(model)
        config = model.config.get_text_config()
        scale = 1.0
        for name in MULTIPLIERS:
            scale *= getattr(config, name, None) or 1.0
        for name in DIVISORS:
            scale /= getattr(config, name, None) or 1.0
        caps = [getattr(config, name, None) for name in SOFT_CAPS]
        return cls(
            weight=layer.weight.detach(),
            bias=None if layer.bias is None else layer.bias.detach(),
            scale=float(scale),
            soft_cap=next((float(cap) for cap in caps if cap), None),
        )

    def of_support(self, support: Support) -> LanguageModelHead:
        """The rows of the support, the ids that it leaves out excluded."""
        weight, bias = self.weight[: support.size], self.bias
        missing = support.size - len(weight)
        if missing > 0:  # ids of a student's longer table, which are unused
            weight = nn.functional.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else nn.functional.pad(bias, (0, missing))
        return replace(
            self,
            weight=weight,
            bias=None if bias is None else bias[: support.size],
            unused=support.unused,
        )

    def to(self, device: torch.device | str) -> LanguageModelHead:
        """The head on another device, in float32, as it computes."""
        return replace(
            self,
            weight=self.weight.to(device, torch.float32),
            bias=None if self.bias is None else self.bias.to(device, torch.float32),
        )

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [..., R] float32 of states [..., D]; the products are float32 too."""
        bias = None if self.bias is None else self.bias.float()
        logits = nn.functional.linear(states.float(), self.weight.float(), bias) * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        if self.unused:
            logits[..., list(self.unused)] = -torch.inf
        return logits

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        num_rows, width = self.weight.shape
        return {
            "num_rows": num_rows,
            "width": width,
            "has_bias": self.bias is not None,
            "logit_scale": self.scale,
            "soft_cap": self.soft_cap,
        }

    def write(self, folder: Path) -> None:
        """Commit it without loss; equal heads give equal bytes.

        Raises:
            UserError: where the file system refuses.
        """
        tensors = {
            "weight": _smallest(self.weight),
            "logit_scale": torch.tensor(self.scale, dtype=torch.float64),
            "unused": torch.tensor(self.unused, dtype=torch.int64),
        }
        if self.bias is not None:
            tensors["bias"] = _smallest(self.bias)
        if self.soft_cap is not None:
            tensors["soft_cap"] = torch.tensor(self.soft_cap, dtype=torch.float64)
        write_bytes_atomically(folder / HEAD_FILE, save(tensors))


def read_language_model_head(cache: Path, manifest: Manifest) -> LanguageModelHead:
    """The head of a cache of hidden states, on the CPU, in the number format of the file.

    Raises:
        UserError: if the cache was made without one.
        CheckFailed: if the file is damaged or missing.
    """
    if HEAD_FILE not in manifest.teacher_files:
        raise UserError(
            f"{cache} holds no language-model head, so no logits can be had from states: make a "
            "cache with --codec hidden"
        )
    tensors = load(read_teacher_file(cache, manifest, HEAD_FILE))
    soft_cap = tensors.get("soft_cap")
    return LanguageModelHead(
        weight=tensors["weight"],
        bias=tensors.get("bias"),
        scale=float(tensors["logit_scale"]),
        soft_cap=None if soft_cap is None else float(soft_cap),
        unused=tuple(tensors["unused"].tolist()),
    )


def check_head(head: LanguageModelHead, states: Tensor, logits: Tensor) -> float:
    """Compare the teacher's logits with those of its states in f16.

    Args:
        head: without what a support leaves out.
        states: [N, D], N > 0, what the head reads (`language_model.final_states`).
        logits: [N, R] of the same forward pass.

    Returns:
        The largest difference, nats.

    Raises:
        UserError: if a logit differs by more than rounding explains.
    """
    with torch.inference_mode():
        exact = logits.float()
        apart = (head(states.half()) - exact).abs().amax(dim=1)
        allowed = (TOLERANCE * exact.std(dim=1, correction=0)).clamp(min=LEAST_TOLERANCE)
    worst = int((apart / allowed).argmax())  # of a NaN: its own place
    if not bool((apart <= allowed).all()):
        raise UserError(
            f"the teacher's logits differ by up to {float(apart[worst]):.2g} from those of its "
            f"cached states and its head, expected at most {float(allowed[worst]):.2g}: its head "
            "does more than a linear layer, a scale and a soft cap, so use --codec topk"
        )
    return float(apart.max())


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear output layer, so its logits cannot be had from "
            "cached states: use --codec topk"
        )
    return layer


def _smallest(tensor: Tensor) -> Tensor:
    """The values in the smallest number format that holds them exactly."""
    wide = tensor.float().cpu()
    for dtype in (torch.float16, torch.bfloat16):
        narrow = wide.to(dtype)
        if torch.equal(narrow.float(), wide):
            return narrow.contiguous()
    return wide.contiguous()
