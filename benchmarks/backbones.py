"""The backbones that are compared: token ids to one vector per position, of one width and depth."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from teacher_cache.stages.student.backbone import MambaStudentModel
from teacher_cache.stages.student.config import MambaStudentConfig

BASELINE = "encoder"
EXPAND, STATES, HEAD_WIDTH = 3, 48, 96  # of every Mamba; the student's defaults
VOCAB_SIZE = 1000  # small, so that the embedding's gradient is no part of the story

transformers.logging.set_verbosity_error()  # it says at each call that it has no CUDA kernels


@dataclass(frozen=True)
class Sizes:
    """What the backbones have in common.

    Attributes:
        width: of the residual stream; a multiple of 32.
        num_layers: of each.
        max_length: positions that the encoder's table holds.
    """

    width: int
    num_layers: int
    max_length: int


@dataclass(frozen=True)
class Backbone:
    """One column of the tables.

    Attributes:
        title: as printed.
        about: what exactly runs.
        build: a model with fresh weights.
        needs: a library without which it would be something else, or none.
    """

    title: str
    about: str
    build: Callable[[Sizes], nn.Module]
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or none."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed, and without it this would be another path"
        return None


def forward_backward(model: nn.Module, ids: Tensor) -> float:
    """Seconds of one forward and backward over `ids` [B, S], with a random gradient."""
    generator = torch.Generator(ids.device).manual_seed(0)
    width = model.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue]
    gradient = torch.randn(*ids.shape, width, device=ids.device, generator=generator)
    _synchronize(ids)
    started = time.perf_counter()
    model(input_ids=ids).last_hidden_state.backward(gradient)
    _synchronize(ids)
    return time.perf_counter() - started


def random_ids(batch: int, length: int, device: torch.device) -> Tensor:
    """Token ids [batch, length], the same for every backbone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=generator).to(device)


def _synchronize(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


def _encoder(sizes: Sizes) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=max(1, sizes.width // 64),
        intermediate_size=4 * sizes.width,
        max_position_embeddings=sizes.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.set_attn_implementation("sdpa")
    return encoder


def _ours(sizes: Sizes, arch: str) -> nn.Module:
    return MambaStudentModel(
        MambaStudentConfig(
            arch=arch,
            vocab_size=VOCAB_SIZE,
            d_model=sizes.width,
            num_layers=sizes.num_layers,
            expand=EXPAND,
            d_state=STATES,
            head_dim=HEAD_WIDTH,
        )
    )


def _their_mamba(sizes: Sizes, use_mambapy: bool) -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        expand=EXPAND,
        state_size=STATES,
        use_mambapy=use_mambapy,
        use_cache=False,
    )
    with without_kernels():
        return transformers.MambaModel(config)


def _their_mamba2(sizes: Sizes) -> nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        expand=EXPAND,
        state_size=STATES,
        head_dim=HEAD_WIDTH,
        num_heads=EXPAND * sizes.width // HEAD_WIDTH,
        n_groups=1,
        use_cache=False,
    )
    with without_kernels():
        return transformers.Mamba2Model(config)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Hide the CUDA kernels from transformers, which looks for them when it imports a model.

    Its columns are named for its PyTorch paths, so they are what has to run.
    """
    names = ("mamba_ssm", "causal_conv1d")
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


BACKBONES = {
    BASELINE: Backbone(
        "encoder",
        "transformers' BertModel, heads of 64, feed-forward of 4 widths, SDPA attention",
        _encoder,
    ),
    "mamba": Backbone("our Mamba-1", "the student, arch mamba", lambda s: _ours(s, "mamba")),
    "mamba2": Backbone("our Mamba-2", "the student, arch mamba2", lambda s: _ours(s, "mamba2")),
    "hf-mamba2": Backbone(
        "transformers Mamba-2", "Mamba2Model's PyTorch path, its chunks of 256", _their_mamba2
    ),
    "hf-mambapy": Backbone(
        "transformers use_mambapy",
        "MambaModel with use_mambapy=True",
        lambda sizes: _their_mamba(sizes, use_mambapy=True),
        needs="mambapy",
    ),
    "hf-mamba": Backbone(
        "transformers Mamba-1",
        "MambaModel's default PyTorch path, one step after the other",
        lambda sizes: _their_mamba(sizes, use_mambapy=False),
    ),
}
