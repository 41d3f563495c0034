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
from transformers import PreTrainedConfig, PreTrainedModel

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.cache.manifest import Manifest, read_teacher_file
from teacher_cache.stages.models.batching import MODEL_FAILURES, logits_close
from teacher_cache.stages.models.causal import head_logits
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
DIVISORS = ("logits_scaling",)  # Granite, MiniCPM3
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # whose configuration has it by the same name
# Gemma, RecurrentGemma, xLSTM.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MASKED = -1e6  # a logit below it is of an id that the model leaves out, by whatever number
_NUM_TRIED = 8  # states
_LARGEST_TRIED = 200.0  # logit before a cap, which shows whatever cap there is
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
            scale *= _number(config, name) or 1.0
        for name in DIVISORS:
            factor = _number(config, name) or 1.0
            scale *= factor if config.model_type in MULTIPLIES_BY_DIVISOR else 1 / factor
        caps = [_number(config, name) for name in SOFT_CAPS]
        return cls(
            weight=layer.weight.detach(),
            bias=None if layer.bias is None else layer.bias.detach(),
            scale=float(scale),
            soft_cap=next((float(cap) for cap in caps if cap), None),
        )

    @classmethod
    def measured(cls, model: PreTrainedModel) -> LanguageModelHead:
        """The head of a causal language model, which does nothing else, whatever it is given.

        On states whose logits are far beyond any of text, so that a soft cap shows. Ids that the
        model masks are of no use.

        Raises:
            UserError: if it does more than a linear layer, a scale and a soft cap.
        """
        head = cls.of(model)
        width = head.weight.shape[1]
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(_NUM_TRIED, width, generator=generator).to(model.device)
        with torch.inference_mode():
            plain = replace(head, soft_cap=None)(states)
            states = states * (_LARGEST_TRIED / plain.abs().max())
            try:
                own = head_logits(model, states.to(model.dtype))
            except MODEL_FAILURES as error:
                raise UserError(_more_than_linear(model, first_line(error))) from error
            found = head(states.to(model.dtype))
        is_masked = (own <= MASKED).all(dim=0)
        if found.shape != own.shape or not logits_close(found[:, ~is_masked], own[:, ~is_masked]):
            raise UserError(_more_than_linear(model, "they differ on large states"))
        return replace(head, unused=tuple(is_masked.nonzero()[:, 0].tolist()))

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
            unused=tuple(sorted({*support.unused, *(i for i in self.unused if i < support.size)})),
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
        is_masked = exact <= MASKED  # says nothing of the others' spread
        apart = (head(states.half()) - exact).abs().where(~is_masked, 0.0).amax(dim=1)
        kept = exact.where(~is_masked, torch.nan)
        mean = kept.nanmean(dim=1, keepdim=True)
        spread = (kept - mean).square().nanmean(dim=1).sqrt()
        allowed = (TOLERANCE * spread).clamp(min=LEAST_TOLERANCE)
    worst = int((apart / allowed).argmax())  # of a NaN: its own place
    if not bool((apart <= allowed).all()):
        raise UserError(
            f"the teacher's logits differ by up to {float(apart[worst]):.2g} from those of its "
            f"cached states and its head, expected at most {float(allowed[worst]):.2g}: its head "
            "does more than a linear layer, a scale and a soft cap, so use --codec topk"
        )
    return float(apart.max())


def _number(config: PreTrainedConfig, name: str) -> float | None:
    """MPT's configuration may hold a word there, which its model does not read."""
    found = getattr(config, name, None)
    return float(found) if isinstance(found, (int, float)) else None


def _more_than_linear(model: PreTrainedModel, how: str) -> str:
    return (
        f"the head of {type(model).__name__} does more than a linear layer, a scale and a soft cap "
        f"({how}), so its logits cannot be had from cached states: use --codec topk"
    )


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
