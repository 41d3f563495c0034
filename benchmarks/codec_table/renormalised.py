"""The naive baseline: a head that claims all mass, because its tail's was thrown away.

It is no codec of the product, and here it is one line: without a tail, what `topk` decodes is the
softmax over the head alone, and the student's cross-entropy to that is the published Top-K
distillation (Anshumann et al. 2025, arXiv:2503.16870, which shows that it is biased).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from teacher_cache.cache.codecs.topk import TAIL_R
from teacher_cache.cache.fingerprint import fingerprint
from teacher_cache.cache.manifest import TEACHER_FOLDER, Manifest
from teacher_cache.cache.plan import LABELED, ShardPlan
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import Ragged
from teacher_cache.cache.writer import CacheWriter


def without_tail(sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample of a `topk` cache whose tail holds nothing, at every temperature."""
    return {**sample, TAIL_R: np.full_like(sample[TAIL_R], -np.inf)}


def renormalised_cache(cache: Path, out: Path) -> Path:
    """The cache of a `topk` cache's samples without their tails; returns its folder."""
    reader = CacheReader(cache)
    manifest = _renormalised(reader.manifest)
    plan = ShardPlan(
        num_documents=manifest.splits[LABELED].num_documents,
        documents_per_shard=manifest.layout["documents_per_shard"],
    )
    with CacheWriter(out, manifest, {LABELED: plan}, overwrite=False) as writer:
        todo = writer.begin(
            lambda folder: _copy_teacher_files(reader.cache / TEACHER_FOLDER, folder)
        )
        for split, shard_idx in todo:
            fields = reader.shard(shard_idx)
            tails = fields[TAIL_R]
            assert isinstance(tails, Ragged), "a field of positions"
            fields[TAIL_R] = replace(tails, values=np.full_like(tails.values, -np.inf))
            writer.commit(split, shard_idx, fields, num_truncated=0, environment={})
        if not writer.manifest.complete:
            writer.finish()
    return out


def _renormalised(manifest: Manifest) -> Manifest:
    """That of the new cache: other values have other settings, and nothing is written yet."""
    settings = {**manifest.settings, "tail": "none: the benchmark's renormalised baseline"}
    return replace(
        manifest,
        settings=settings,
        fingerprint=fingerprint(settings),
        index=(),
        teacher_files={},
        complete=False,
        completed_at=None,
    )


def _copy_teacher_files(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
