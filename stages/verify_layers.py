"""`pipe verify --deep` of attention maps and hidden states: the teacher's layers again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.codecs.attention import largest_kl, row_kl
from teacher_cache.cache.errors import CheckFailed
from teacher_cache.stages.teacher.config import ShardConfig
from teacher_cache.stages.teacher.layer_plan import LayerPlan
from teacher_cache.stages.teacher.layer_tap import LayerTap
from teacher_cache.stages.teacher.load import Teacher

# Of a state's length: what float16 rounds off on disk, and what batches of other shapes round.
STATE_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.02}
# Of a row of a map, nats, beyond what its encoding can lose.
MAP_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.01}


class LayersApart:
    """How far cached maps and states are from the teacher's; a listener of a tap.

    Args:
        plan: of the cache.

    Attributes:
        map_kl: the largest KL of a row beyond what its encoding can lose, nats.
        state: the largest distance of a state, as a share of the cached one's length.
    """

    def __init__(self, plan: LayerPlan):
        self._plan = plan
        self._samples: Sequence[Mapping[str, np.ndarray]] = ()
        self.map_kl = 0.0
        self.state = 0.0

    def tap(self, model: PreTrainedModel, samples: Sequence[Mapping[str, np.ndarray]]) -> LayerTap:
        """What compares these samples, as the reader gives them, while the teacher reads them."""
        self._samples = samples
        return LayerTap(model, self._plan, self)

    def __call__(self, name: str, sample: int, piece: int, values: Tensor) -> None:
        """Compare a piece."""
        cached = self._samples[sample]
        again = values.float().cpu().numpy()
        lengths = _lengths(cached)
        if name in self._plan.widths:
            start = sum(lengths[:piece])
            stored = cached[name][start : start + lengths[piece]]
            self.state = float(np.maximum(self.state, apart(again, stored).max()))
            return
        codec = self._plan.attention
        assert codec is not None, "no other field is heard"
        stored = codec.split(cached[name], lengths)[piece]
        kl = row_kl(again, codec.decode(stored, lengths[piece])) - largest_kl(again)
        self.map_kl = float(np.maximum(self.map_kl, kl.max()))  # a NaN stays one

    def require_close(self, cache: Path, dtype: str) -> None:
        """Refuse what number format and encoding do not explain.

        Raises:
            CheckFailed: naming the distance and the tolerance.
        """
        if not self.map_kl <= MAP_TOLERANCE[dtype]:
            raise CheckFailed(
                f"rows of the teacher's attention maps are up to {self.map_kl:.2g} nats further "
                f"from those in {cache} than their encoding explains, expected at most "
                f"{MAP_TOLERANCE[dtype]}: make the cache again with --overwrite"
            )
        if not self.state <= STATE_TOLERANCE[dtype]:
            raise CheckFailed(
                f"the teacher's hidden states are up to {self.state:.2g} of their length away from "
                f"those in {cache}, expected at most {STATE_TOLERANCE[dtype]}: make the cache "
                "again with --overwrite"
            )


def recorded_plan(settings: Mapping[str, Any], teacher: Teacher) -> LayerPlan:
    """What a cache holds of the teacher's layers.

    Args:
        settings: of its manifest.
        teacher: the one that made it.
    """
    maps = settings.get("attention", {"mode": "none", "layers": None})
    config = ShardConfig(
        teacher=teacher.name,
        task=settings["task"],
        hidden=settings.get("hidden", "none"),
        attention=maps["mode"],
        attention_layers=maps["layers"],
    )
    return LayerPlan.prepared(config, teacher, is_packed=settings["task"] == "lm")


def apart(again: np.ndarray, cached: np.ndarray) -> np.ndarray:
    """[N] distances between vectors [N, D], each as a share of the cached one's length."""
    wide = cached.astype(np.float64)
    # A vector of zeros is as far from itself as nothing.
    length = np.maximum(np.linalg.norm(wide, axis=1), np.finfo(np.float64).tiny)
    return np.linalg.norm(again - wide, axis=1) / length


def _lengths(sample: Mapping[str, np.ndarray]) -> list[int]:
    """Of the sample's pieces."""
    if "segment" in sample:
        return np.bincount(sample["segment"]).tolist()
    return [len(sample["input_ids"])]
