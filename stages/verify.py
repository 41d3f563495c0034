"""`pipe verify --deep`: run the teacher again on a few cached samples and compare what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.codecs.attention import largest_kl, row_kl
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.models.device import resolve_device, resolve_dtype
from teacher_cache.stages.tasks import TASKS
from teacher_cache.stages.teacher.config import LayersConfig, TeacherConfig
from teacher_cache.stages.teacher.layers import STATE_TOLERANCE, LayerPlan, LayerTap, states_apart
from teacher_cache.stages.teacher.load import Teacher

# Of a row of a map, nats, beyond what its encoding can lose.
ATTENTION_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.01}


def verify_deep(
    cache: Path,
    num_samples: int,
    *,
    teacher: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Compare cached logits, states and attention maps with the teacher's.

    On samples that are evenly spaced over all splits.

    Args:
        cache: the cache's folder.
        num_samples: how many, at most, of each split.
        teacher: where the teacher lies now, if not where the manifest says.
        trust_remote_code: run the model code that its repository brings.

    Returns:
        The largest absolute difference of a logit; of a language model the largest KL of a
        position, nats.

    Raises:
        CheckFailed: if the teacher's weights are others, or a logit, a distribution, a state or an
            attention map differs by more than number format and encoding explain.
        UserError: if the teacher cannot be loaded, or the cache lacks what it decodes with.
    """
    reader = CacheReader(cache)
    settings = reader.manifest.settings
    recorded = settings["teacher"]
    if "engine" in recorded:
        raise UserError(
            f"{cache} was made of what {recorded['engine']} wrote, and there is no teacher here to "
            "ask again: leave --deep out, which still checks every byte"
        )
    task = TASKS[settings["task"]].teacher
    loaded = task.load(
        _config(
            recorded["dtype"],
            teacher=teacher or reader.manifest.about["teacher"],
            max_length=settings["max_length"],
            trust_remote_code=trust_remote_code,
        ),
        with_attention="attention" in settings,
    )
    _require_same(loaded, recorded, cache)
    comparison = task.comparison(reader, loaded)
    plan = recorded_plan(settings, loaded, is_packed=task.packs_documents)
    layers = LayersApart(plan)
    for split in reader.manifest.splits:
        of_split = CacheReader(cache, split)
        if not len(of_split):
            continue
        chosen = np.unique(np.linspace(0, len(of_split) - 1, num_samples).astype(int))
        samples = [of_split.sample(int(sample_idx)) for sample_idx in chosen]
        comparison.compare(samples, lambda some: layers.tap(loaded.model, some))
    worst = comparison.require_close(cache, recorded["dtype"])
    layers.require_close(cache, recorded["dtype"])
    return worst


def _require_same(loaded: Teacher, recorded: Mapping[str, Any], cache: Path) -> None:
    same_weights = loaded.weights_sha256 == recorded["weights_sha256"]
    if not same_weights or loaded.config_sha256 != recorded["config_sha256"]:
        raise CheckFailed(
            f"the teacher {loaded.name} has other weights or another configuration than the one "
            f"that made {cache}: name the right one with --teacher"
        )


def _config(recorded_dtype: str, **given: Any) -> TeacherConfig:
    """In the cache's number format, or in float32 where this device does not compute it."""
    config = TeacherConfig.model_validate({"dtype": recorded_dtype, **given})
    try:
        resolve_dtype(config, resolve_device(config))
    except UserError:
        return config.model_copy(update={"dtype": "float32"})
    return config


def recorded_plan(settings: Mapping[str, Any], teacher: Teacher, *, is_packed: bool) -> LayerPlan:
    """What a cache holds of the teacher's layers.

    Args:
        settings: of its manifest.
        teacher: the one that made it.
        is_packed: its samples hold several documents.
    """
    maps = settings.get("attention", {"mode": "none", "layers": None})
    config = LayersConfig(
        hidden=settings.get("hidden", "none"),
        attention=maps["mode"],
        attention_layers=maps["layers"],
    )
    return LayerPlan.prepared(
        config, teacher, is_packed=is_packed, hears_layers="hidden_of" in settings
    )


class LayersApart:
    """How far cached maps and states are from the teacher's; a listener of a tap.

    Args:
        plan: of the cache.
    """

    def __init__(self, plan: LayerPlan):
        self._plan = plan
        self._samples: Sequence[Mapping[str, np.ndarray]] = ()
        self._attention_kl = 0.0  # of a row beyond what its encoding can lose, nats
        self._state = 0.0  # as a share of the cached one's length

    def tap(self, model: PreTrainedModel, samples: Sequence[Mapping[str, np.ndarray]]) -> LayerTap:
        """What compares these samples, as the reader gives them, while the teacher reads them."""
        self._samples = samples
        return LayerTap(model, self._plan, self)

    def __call__(self, name: str, sample: int, piece: int, values: Tensor) -> None:
        """Compare a piece."""
        cached = self._samples[sample]
        again = values.float().cpu().numpy()
        lengths = _stored_lengths(cached)
        if name in self._plan.widths:
            start = sum(lengths[:piece])
            stored = cached[name][start : start + lengths[piece]]
            self._state = float(np.maximum(self._state, states_apart(again, stored).max()))
            return
        codec = self._plan.attention
        assert codec is not None, "no other field is heard"
        stored = codec.split(cached[name], lengths)[piece]
        kl = row_kl(again, codec.decode(stored, lengths[piece])) - largest_kl(again)
        self._attention_kl = float(np.maximum(self._attention_kl, kl.max()))  # a NaN stays one

    def require_close(self, cache: Path, dtype: str) -> None:
        """Refuse what number format and encoding do not explain.

        Raises:
            CheckFailed: naming the distance and the tolerance.
        """
        if not self._attention_kl <= ATTENTION_TOLERANCE[dtype]:
            raise CheckFailed(
                f"rows of the teacher's attention maps are up to {self._attention_kl:.2g} nats "
                f"further from those in {cache} than their encoding explains, expected at most "
                f"{ATTENTION_TOLERANCE[dtype]}: make the cache again with --overwrite"
            )
        if not self._state <= STATE_TOLERANCE[dtype]:
            raise CheckFailed(
                f"the teacher's hidden states are up to {self._state:.2g} of their length away "
                f"from those in {cache}, expected at most {STATE_TOLERANCE[dtype]}: make the cache "
                "again with --overwrite"
            )


def _stored_lengths(sample: Mapping[str, np.ndarray]) -> list[int]:
    """Of the sample's pieces."""
    if "segment" in sample:
        return np.bincount(sample["segment"]).tolist()
    return [len(sample["input_ids"])]
