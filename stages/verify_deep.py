"""`pipe verify --deep`: run the teacher again on a few cached samples and compare the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import POOLED, width_of_pooled
from teacher_cache.stages.models.device import resolve_device, resolve_dtype
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.forward import run_teacher
from teacher_cache.stages.teacher.language_model import LanguageModelTeacher, load_language_model
from teacher_cache.stages.teacher.load import load_teacher
from teacher_cache.stages.verify_layers import STATE_TOLERANCE, LayersApart, apart, recorded_plan
from teacher_cache.stages.verify_positions import verify_positions

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
