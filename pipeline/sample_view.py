"""One cached sample as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.pipeline.language_tables import is_language_model
from teacher_cache.pipeline.pictures.attention_maps import Panels, readable_tokens, teacher_maps
from teacher_cache.pipeline.pictures.both_maps import both_sides
from teacher_cache.pipeline.position_view import print_distributions
from teacher_cache.stages.tokenizers import load_tokenizer


def print_sample(console: Console, cache: Path, sample_id: str) -> None:
    """Print a sample's text, tokens, label and the teacher's distribution.

    Raises:
        UserError: if no split has exactly one sample of that id.
    """
    split, sample_idx = _find(cache, sample_id)
    reader = CacheReader(cache, split)
    sample = reader.sample(sample_idx)
    tokenizer = load_tokenizer(str((cache / TEACHER_FOLDER).resolve()), option="CACHE")
    console.print(f"{split} sample {sample_idx}, id {sample['sample_id'].tobytes().hex()}")
    if is_language_model(reader.manifest):
        print_distributions(console, reader.manifest, sample, tokenizer, cache)
    else:
        _print_classes(console, reader.manifest, sample)
    ids = sample["input_ids"].tolist()
    console.print(f"text: {tokenizer.decode(ids, skip_special_tokens=True)}", soft_wrap=True)
    console.print(
        f"{len(ids)} tokens: {' '.join(tokenizer.convert_ids_to_tokens(ids))}", soft_wrap=True
    )


def attention_panels(cache: Path, sample_id: str, *, run: Path | None = None) -> Panels:
    """The cached attention maps of a sample.

    Args:
        cache: its folder.
        sample_id: or its beginning.
        run: a student's, whose mixing matrices stand beside the maps; or none.

    Raises:
        UserError: if no split has exactly one sample of that id, the cache holds no maps, or the
            run cannot be compared with them.
    """
    split, sample_idx = _find(cache, sample_id)
    reader = CacheReader(cache, split)
    sample = reader.sample(sample_idx)
    tokenizer = load_tokenizer(str((cache / TEACHER_FOLDER).resolve()), option="CACHE")
    if run is not None:
        return both_sides(reader, sample, tokenizer, run)
    tokens = readable_tokens(tokenizer, sample["input_ids"].tolist())
    return Panels(maps=teacher_maps(reader.manifest, sample, tokens), tokens=tokens)


def _print_classes(console: Console, manifest: Manifest, sample: Mapping[str, np.ndarray]) -> None:
    names = manifest.about["id2label"]
    label = int(sample["label"])
    logits = sample["class_logits"].astype(np.float64)
    probabilities = np.exp(logits - np.logaddexp.reduce(logits))
    console.print(f"label: {'none' if label == NO_LABEL else names[str(label)]}")
    for class_id, (logit, probability) in enumerate(zip(logits, probabilities, strict=True)):
        console.print(f"  {names[str(class_id)]:>12}  logit {logit:+.4f}  p {probability:.4f}")


def _find(cache: Path, sample_id: str) -> tuple[str, int]:
    splits = CacheReader(cache).manifest.splits
    found = [(split, i) for split in splits for i in CacheReader(cache, split).find(sample_id)]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} samples of {cache} have an id that starts with {sample_id!r}: give a "
            f"whole id, `pipe inspect {cache}` prints some"
        )
    return found[0]
