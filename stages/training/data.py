"""The cache as training sees it: what is trained on, what is held out, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import LABELED, UNLABELED, viewed_split
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.schema import width_of_pooled
from teacher_cache.stages.heads import SINGLE, Head
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    BothKinds,
    CachedSamples,
    SeveralSplits,
    batches_per_epoch,
    held_out,
)
from teacher_cache.stages.training.config import TrainingConfig, UnlabeledFrom


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Samples and their order.

    Attributes:
        training: samples to train on, of both kinds.
        evaluation: labelled samples that are held out, shortest first; None without any.
        num_steps: optimizer steps of the whole training.
        steps_per_epoch: until every labelled sample was seen once.
        batches: every batch of the training.
        pooled_width: D of the teacher's pooled states, where they are matched; None elsewhere.
    """

    training: BothKinds
    evaluation: CachedSamples | None
    num_steps: int
    steps_per_epoch: int
    batches: AlternatingBatches
    pooled_width: int | None = None


def open_splits(
    cache: Path, unlabeled_alpha: float, unlabeled_from: UnlabeledFrom = "all"
) -> list[CacheReader]:
    """The labelled split and, where they count, the unlabelled one and all views.

    A split of views may be empty, where documents are too short for so many: it is left out.

    Args:
        cache: its folder.
        unlabeled_alpha: weight of the unlabelled samples; none are read at 0.
        unlabeled_from: which of them.

    Raises:
        UserError: if unlabelled text is asked for and missing, or a corpus has no samples.
    """
    labeled = CacheReader(cache, LABELED)
    unlabeled = [split for split in labeled.manifest.splits if split != LABELED]
    if unlabeled_alpha and not unlabeled:
        raise UserError(
            f"--unlabeled-alpha {unlabeled_alpha:g} needs unlabelled text, and {cache} holds none: "
            "make a cache with --unlabeled or --views, or leave the option out"
        )
    readers = [labeled]
    if unlabeled_alpha:
        chosen = _choose(unlabeled, unlabeled_from, cache)
        readers += [CacheReader(cache, split) for split in chosen]
    for reader in readers:
        if not len(reader) and viewed_split(reader.split) is None:
            raise UserError(
                f"the {reader.split} split of {cache} holds no samples, all its documents are "
                "empty: cache others, or train without it"
            )
    return [reader for reader in readers if len(reader)]


def _choose(splits: list[str], unlabeled_from: UnlabeledFrom, cache: Path) -> list[str]:
    if unlabeled_from == "all":
        return splits
    viewed = {"corpus": {None}, "views": {LABELED, UNLABELED}, "labeled-views": {LABELED}}
    chosen = [one for one in splits if viewed_split(one) in viewed[unlabeled_from]]
    if not chosen:
        is_corpus = unlabeled_from == "corpus"
        wanted, option = (
            ("an unlabelled corpus", "--unlabeled") if is_corpus else ("views", "--views")
        )
        raise UserError(
            f"--unlabeled-from {unlabeled_from} needs {wanted} in the cache, and {cache} holds "
            f"none, only {', '.join(splits)}: make a cache with {option}, or leave the option out"
        )
    return chosen


def training_data(
    config: TrainingConfig,
    objective: ObjectiveConfig,
    readers: Sequence[CacheReader],
    *,
    head: Head = SINGLE,
) -> TrainingData:
    """A classifier's: `ordered_data`, with pooled states where they are matched.

    Args:
        config: of the training.
        objective: what weighs the kinds of sample, and pooled states.
        readers: of `open_splits`.
        head: what the teacher's outputs mean.

    Raises:
        UserError: as `ordered_data`, or if one class is all there is to train on, or the cache
            lacks the pooled states that are to be matched.
    """
    labeled = readers[0]
    weight = objective.pooled_weight
    pooled_width = _pooled_width(weight, labeled) if weight else None
    _require_labels(config, labeled, head, alpha=objective.alpha)
    data = ordered_data(config, readers, CachedSamples, unlabeled_alpha=objective.unlabeled_alpha)
    return replace(data, pooled_width=pooled_width)


def ordered_data(
    config: TrainingConfig,
    readers: Sequence[CacheReader],
    samples: Callable[..., CachedSamples],
    *,
    unlabeled_alpha: float,
) -> TrainingData:
    """Hold a share out, and lay down the order of all batches.

    Args:
        config: of the training.
        readers: of `open_splits`.
        samples: makes a split's, of the arguments of `CachedSamples`.
        unlabeled_alpha: weight of the unlabelled samples; none take part at 0.

    Raises:
        UserError: if there is no sample to train on, no unlabelled one where they are asked for,
            or early stopping has nothing to evaluate.
    """
    labeled = readers[0]
    is_held_out = held_out(labeled.sample_ids(), config.eval_fraction)
    if is_held_out.all():
        raise UserError(
            f"--eval-fraction {config.eval_fraction:g} holds out all {len(labeled)} samples of "
            f"{labeled.cache}: cache more of the data, or hold out less"
        )
    training = BothKinds(
        samples(labeled, np.flatnonzero(~is_held_out), labeled=True),
        _unlabeled_samples(config, readers[1:], samples, unlabeled_alpha),
    )
    evaluation = samples(labeled, _by_length(labeled, is_held_out), labeled=True)
    if config.early_stopping is not None and not len(evaluation):
        raise UserError(
            "--early-stopping needs an evaluation, and --eval-fraction holds out no sample: raise "
            "that share"
        )
    per_epoch = batches_per_epoch(
        len(training.labeled),
        batch_size=config.batch_size,
        unlabeled_ratio=config.unlabeled_ratio if training.unlabeled else 0.0,
    )
    steps_per_epoch = -(-per_epoch // config.gradient_accumulation)
    num_steps = config.max_steps or max(1, round(config.epochs * steps_per_epoch))
    return TrainingData(
        training=training,
        evaluation=evaluation if len(evaluation) else None,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        batches=AlternatingBatches(
            training,
            batch_size=config.batch_size,
            num_batches=num_steps * config.gradient_accumulation,
            unlabeled_ratio=config.unlabeled_ratio,
            seed=config.seed,
        ),
    )


def _pooled_width(weight: float, reader: CacheReader) -> int:
    width = width_of_pooled(reader.manifest.schema)
    if width is None:
        raise UserError(
            f"--pooled-weight {weight:g} needs the teacher's pooled states, and "
            f"{reader.cache} holds none: make a cache with `pipe cache-teacher --hidden pooled`, "
            "or leave the option out"
        )
    return width


def _unlabeled_samples(
    config: TrainingConfig,
    readers: Sequence[CacheReader],
    samples: Callable[..., CachedSamples],
    unlabeled_alpha: float,
) -> SeveralSplits | None:
    """All but the views of labelled documents that are held out; None where none take part."""
    if not unlabeled_alpha:
        return None
    splits: list[CachedSamples] = []
    for reader in readers:
        sample_idxs = np.arange(len(reader))
        if viewed_split(reader.split) == LABELED:
            sample_idxs = sample_idxs[~held_out(reader.sample_ids(), config.eval_fraction)]
        splits.append(samples(reader, sample_idxs, labeled=False))
    if not any(len(split) for split in splits):
        raise UserError(
            f"{config.cache} holds no unlabelled text and no view of a document that is trained "
            f"on, which --unlabeled-alpha {unlabeled_alpha:g} needs: cache more of the "
            "data, or leave the option out"
        )
    return SeveralSplits(splits)


def _by_length(reader: CacheReader, chosen: np.ndarray) -> np.ndarray:
    sample_idxs = np.flatnonzero(chosen)
    return sample_idxs[np.argsort(reader.lengths()[sample_idxs], kind="stable")]


def has_held_out_labels(config: TrainingConfig, reader: CacheReader, head: Head = SINGLE) -> bool:
    """Whether a held-out sample of a classifier's corpus has a label; true where none is held out.

    Args:
        config: of the training.
        reader: of the corpus.
        head: whose labels they are.
    """
    chosen = held_out(reader.sample_ids(), config.eval_fraction)
    return not chosen.any() or bool(head.has_label(reader.column("label")[chosen]).any())


def _require_labels(
    config: TrainingConfig, reader: CacheReader, head: Head, *, alpha: float
) -> None:
    """Refuse labels that are all alike, and no labels where nothing else is learned.

    Raises:
        UserError: saying what to cache or give.
    """
    labels = reader.column("label")
    is_known = head.has_label(labels)
    if not is_known.any():
        if not alpha:
            raise UserError(
                f"--alpha 0 learns from labels alone, and no document of {reader.cache} has one: "
                "give a weight to the teacher, as in --alpha 1"
            )
        return
    chosen = ~held_out(reader.sample_ids(), config.eval_fraction) & is_known
    head.check_learnable(labels[chosen], reader.cache)
