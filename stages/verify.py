"""`pipe verify --deep`: run the teacher again on a few cached samples and compare the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.cache.codecs.attention import largest_kl, row_kl
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.named import AnyCodec, codec_from
from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import NEXT_LOG_PROB, POOLED, width_of_pooled
from teacher_cache.stages.codecs.probe import kl_to_decoded, probed_temperatures
from teacher_cache.stages.data.packing import PackedSample, Piece
from teacher_cache.stages.models.device import dtype_name, resolve_device, resolve_dtype
from teacher_cache.stages.models.head import read_language_model_head
from teacher_cache.stages.teacher.config import ShardConfig, TeacherConfig
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.layers import LayerPlan, LayerTap
from teacher_cache.stages.teacher.load import (
    LanguageModelTeacher,
    Teacher,
    load_language_model,
    load_teacher,
)
from teacher_cache.stages.teacher.positions import Slice, run_positions
from teacher_cache.stages.tokens.support import AnySupport, support_of_cache

# Batches of other shapes round otherwise: a few units in the last place of the format, amplified
# by the depth of the model.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


def verify_deep(cache: Path, num_samples: int, *, teacher: str | None = None) -> float:
    """Compare cached logits, states and attention maps with the teacher's.

    On samples that are evenly spaced over all splits.

    Args:
        cache: the cache's folder.
        num_samples: how many, at most, of each split.
        teacher: where the teacher lies now, if not where the manifest says.

    Returns:
        The largest absolute difference of a logit; of a language model the largest KL of a
        position, nats.

    Raises:
        CheckFailed: if the teacher's weights are others, or a logit, a state or an attention map
            differs by more than number format and encoding explain.
        UserError: if the teacher cannot be loaded.
    """
    manifest = CacheReader(cache).manifest
    recorded = manifest.settings["teacher"]
    if "engine" in recorded:
        raise UserError(
            f"{cache} was made of what {recorded['engine']} wrote, and there is no teacher here to "
            "ask again: leave --deep out, which still checks every byte"
        )
    load = load_language_model if manifest.settings["task"] == "lm" else load_teacher
    loaded = load(
        _config(teacher or manifest.about["teacher"], recorded["dtype"]),
        with_maps="attention" in manifest.settings,
    )
    same_weights = loaded.weights_sha256 == recorded["weights_sha256"]
    if not same_weights or loaded.config_sha256 != recorded["config_sha256"]:
        raise CheckFailed(
            f"the teacher {loaded.name} has other weights or another configuration than the one "
            f"that made {cache}: name the right one with --teacher"
        )
    if isinstance(loaded, LanguageModelTeacher):
        return verify_positions(cache, loaded, num_samples)
    layers = LayersApart(recorded_plan(manifest.settings, loaded))
    worst = worst_pooled = 0.0
    pooled_width = width_of_pooled(manifest.schema)
    for split in manifest.splits:
        reader = CacheReader(cache, split)
        if not len(reader):
            continue
        chosen = np.unique(np.linspace(0, len(reader) - 1, num_samples).astype(int))
        samples = [reader.sample(int(sample_idx)) for sample_idx in chosen]
        again = run_teacher(
            loaded,
            [sample["input_ids"] for sample in samples],
            batch_tokens=8192,
            pooled_width=pooled_width,
            tap=layers.tap(loaded.model, samples),
        ).vectors
        cached = np.stack([sample["class_logits"] for sample in samples])
        # A NaN stays one.
        worst = float(np.maximum(worst, np.abs(again["class_logits"] - cached).max()))
        if pooled_width is not None:
            pooled = np.stack([sample[POOLED] for sample in samples])
            worst_pooled = float(np.maximum(worst_pooled, apart(again[POOLED], pooled).max()))
    if not worst <= TOLERANCE[recorded["dtype"]]:
        raise CheckFailed(
            f"the teacher's logits differ by up to {worst:.2g} from those in {cache}, expected at "
            f"most {TOLERANCE[recorded['dtype']]}: make the cache again with --overwrite"
        )
    if not worst_pooled <= STATE_TOLERANCE[recorded["dtype"]]:
        raise CheckFailed(
            f"the teacher's pooled states are up to {worst_pooled:.2g} of their length away from "
            f"those in {cache}, expected at most {STATE_TOLERANCE[recorded['dtype']]}: make the "
            "cache again with --overwrite"
        )
    layers.require_close(cache, recorded["dtype"])
    return worst


def _config(teacher: str, recorded_dtype: str) -> TeacherConfig:
    """In the cache's number format, or in float32 where this device does not compute it."""
    config = TeacherConfig.model_validate({"teacher": teacher, "dtype": recorded_dtype})
    try:
        resolve_dtype(config, resolve_device(config))
    except UserError:
        return config.model_copy(update={"dtype": "float32"})
    return config


# Of a position, nats: about half the square of what a logit may differ by, and the codec's own.
KL_TOLERANCE = {"float32": 5e-3, "bfloat16": 0.1, "float16": 0.01}
LOG_PROB_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}
HALF_STEP = 2.0**-10  # of a value in f16, relative


def verify_positions(cache: Path, teacher: LanguageModelTeacher, num_samples: int) -> float:
    """Compare what is cached with the teacher's, on samples evenly spaced over all splits.

    Args:
        cache: the cache's folder.
        teacher: the one that made it.
        num_samples: how many, at most, of each split.

    Returns:
        The largest KL of a position, nats.

    Raises:
        CheckFailed: if a distribution, a next token's log-prob, an attention map or a state
            differs by more than number format and codec explain.
        UserError: if the cached states have no head, or an aligned cache no map.
    """
    manifest = CacheReader(cache).manifest
    codec = codec_from(manifest.settings["codec"])
    if isinstance(codec, HiddenCodec):
        head = read_language_model_head(cache, manifest)
        codec = replace(codec, head=head.to(teacher.device))
    support = support_of_cache(cache, manifest, teacher.tokenizer, teacher.num_logits)
    layers = LayersApart(recorded_plan(manifest.settings, teacher))
    worst, apart = 0.0, 0.0
    for split in manifest.splits:
        reader = CacheReader(cache, split)
        for sample_idx in np.unique(np.linspace(0, len(reader) - 1, num_samples).astype(int)):
            if not len(reader):
                break
            sample = reader.sample(int(sample_idx))
            tap = layers.tap(teacher.model, [sample])
            found = _again(teacher, codec, support, sample, tap)
            worst = float(np.maximum(worst, found["kl"].max()))  # a NaN stays one
            apart = float(np.maximum(apart, found["apart"].max()))
    dtype = dtype_name(teacher.dtype)
    if not (worst <= KL_TOLERANCE[dtype] and apart <= LOG_PROB_TOLERANCE[dtype]):
        raise CheckFailed(
            f"the teacher's distributions differ by up to {worst:.2g} nats, and its next tokens' "
            f"log-probs by {apart:.2g}, from those in {cache}, expected at most "
            f"{KL_TOLERANCE[dtype]} and {LOG_PROB_TOLERANCE[dtype]}: make the cache again with "
            "--overwrite"
        )
    layers.require_close(cache, dtype)
    return worst


def _again(
    teacher: LanguageModelTeacher,
    codec: AnyCodec,
    support: AnySupport,
    sample: Mapping[str, np.ndarray],
    tap: LayerTap,
) -> dict[str, np.ndarray]:
    """[S] KL, and how far the next token's log-prob is off beyond its rounding, of a sample."""
    (temperature, *_) = probed_temperatures(codec)
    rows = codec.expand(sample)
    cached_next = sample[NEXT_LOG_PROB].astype(np.float64)

    def compare(part: Slice) -> dict[str, np.ndarray]:
        where = part.places.cpu().numpy()
        stored = {
            name: torch.from_numpy(one[where]).to(teacher.device) for name, one in rows.items()
        }
        exact_log_probs, unmatched = support.log_probs(part.logits, temperature)
        kl, _ = kl_to_decoded(exact_log_probs, unmatched, codec.decode(stored, temperature))
        log_probs, _ = support.teacher.log_probs(part.logits, 1.0)
        exact = log_probs.gather(1, part.next_ids[:, None])[:, 0].where(part.counts, 0.0)
        cached = cached_next[where]
        off = np.abs(exact.cpu().numpy() - cached) - HALF_STEP * np.abs(cached)
        return {"kl": kl, "apart": np.maximum(off, 0.0)}

    return run_positions(teacher, [_packed(sample)], compare, batch_tokens=8192, tap=tap).values


def _packed(sample: Mapping[str, np.ndarray]) -> PackedSample:
    """The sample as the teacher saw it; of which documents it is, does not matter here."""
    lengths = np.bincount(sample["segment"])
    return PackedSample(
        input_ids=sample["input_ids"],
        segment=sample["segment"],
        pieces=tuple(Piece(document_id=b"", start=0, stop=int(length)) for length in lengths),
    )


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
