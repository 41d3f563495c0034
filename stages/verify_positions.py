"""`pipe verify --deep` of a language model: its distributions again, at every position.

Compared is what the cache gives back. Which ids a `sampled` cache drew is not drawn again: their
log-probs are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.named import AnyCodec, codec_from
from teacher_cache.cache.errors import CheckFailed
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import NEXT_LOG_PROB
from teacher_cache.stages.data.packing import PackedSample, Piece
from teacher_cache.stages.models.device import dtype_name
from teacher_cache.stages.models.head import read_language_model_head
from teacher_cache.stages.teacher.language_model import LanguageModelTeacher
from teacher_cache.stages.teacher.layer_tap import LayerTap
from teacher_cache.stages.teacher.positions import Slice, run_positions
from teacher_cache.stages.teacher.probe import probed_temperatures
from teacher_cache.stages.teacher.reconstruction import kl_to_decoded
from teacher_cache.stages.tokens.support import AnySupport, support_of_cache
from teacher_cache.stages.verify_layers import LayersApart, recorded_plan

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
